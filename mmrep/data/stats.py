"""What is in a set of shards, as a table for people."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrep.data.index import Index
from mmrep.data.reader import Samples


def split_stats(index: Index, split: str) -> dict[str, Any]:
    """Figures of a split, from the index alone.

    Returns:
        ``shards``, ``samples``, ``bytes``, and ``modalities``: for each the samples that have it (``present``), and the
        ``mean`` and ``largest`` bytes of its members.
    """
    samples = Samples(index, split)
    rows = np.concatenate(
        [np.arange(first, first + shard.samples) for first, shard in samples.rows()] or [np.zeros(0, int)]
    )
    present, members = index.table.present[rows].astype(np.uint64), index.table.members[rows]
    modalities = {}
    for name in index.modalities:
        sizes = np.concatenate(
            [
                members["size"][(present >> np.uint64(column) & np.uint64(1)).astype(bool), column]
                for column in samples.columns(name)
            ]
            or [np.zeros(0)]
        )
        has = sum(count for sets, count in zip(*_sets(samples, name), strict=True) if sets)
        modalities[name] = {
            "present": int(has),
            "mean": float(sizes.mean()) if len(sizes) else 0.0,
            "largest": int(sizes.max()) if len(sizes) else 0,
        }
    return {
        "shards": len(samples.shards),
        "samples": len(samples),
        "bytes": sum(shard.bytes for shard in samples.shards),
        "modalities": modalities,
    }


def _sets(samples: Samples, name: str) -> tuple[list[int], list[int]]:
    contents = samples.contents([name])
    return list(contents.sets), contents.counts.sum(axis=0).tolist()


def print_stats(index: Index, title: object) -> None:
    """Print a table of splits, presence and sizes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(title))
    for heading in ("split", "shards", "samples", "MB", *index.modalities):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split in index.splits:
        figures = split_stats(index, split)
        cells = [
            f"{_share(item['present'], figures['samples'])}, {size(item['mean'])}, max {size(item['largest'])}"
            for item in figures["modalities"].values()
        ]
        table.add_row(split, str(figures["shards"]), str(figures["samples"]), f"{figures['bytes'] / 1e6:.1f}", *cells)
    console = Console()
    console.print(table)
    console.print(
        f"group key: {index.group_key or 'none'}   labels: {', '.join(index.labels) or 'none'}   "
        f"excluded: {len(index.excluded)}   fingerprint: {index.fingerprint[:12]}",
        highlight=False,
    )


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"
