"""What is in a set of shards, as a table for people."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.printing import print_table, printable


def split_stats(index: Index, split: str) -> dict[str, Any]:
    """Figures of a split, from the index alone.

    Returns:
        ``shards``, ``samples``, ``bytes``; ``modalities``: for each the samples that have it (``present``), and the
        ``mean`` and ``largest`` bytes of the members that carry it; ``sets``: how many samples have which set of
        modalities, the most frequent first.
    """
    samples = Samples(index, split)
    return {
        "shards": len(samples.shards),
        "samples": len(samples),
        "bytes": sum(shard.bytes for shard in samples.shards),
        "modalities": {name: _modality_stats(samples, name) for name in index.modalities},
        "sets": _sets(samples),
    }


def _modality_stats(samples: Samples, modality: str) -> dict[str, Any]:
    table, columns = samples.index.table, samples.columns(modality)
    present, total, largest = 0, 0, 0
    for first, shard in samples.rows():
        rows = slice(first, first + shard.samples)  # a view of the mapped array: nothing is copied but one column
        masks = table.present[rows].astype(np.uint64)
        has, sizes = np.zeros(len(masks), dtype=bool), np.zeros(len(masks), dtype=np.int64)
        for column in reversed(columns):
            carried = (masks >> np.uint64(column) & np.uint64(1)).astype(bool)
            has |= carried
            sizes[carried] = table.members["size"][rows, column][carried]
        present, total = present + int(has.sum()), total + int(sizes.sum())
        largest = max(largest, int(sizes.max(initial=0)))
    return {"present": present, "mean": total / present if present else 0.0, "largest": largest}


def _sets(samples: Samples) -> dict[tuple[str, ...], int]:
    names = list(samples.index.modalities)
    contents = samples.contents(names)
    counts = zip(contents.sets, contents.counts.sum(axis=0).tolist(), strict=True)
    found = {
        tuple(name for bit, name in enumerate(names) if modality_set >> bit & 1): count
        for modality_set, count in counts
        if count
    }
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


HEADINGS = ("split", "shards", "samples", "MB", "modality", "present", "mean", "largest")


def stats_rows(index: Index) -> list[tuple[str, ...]]:
    """The table of all splits, under `HEADINGS`: a row for each split and modality, the split's own figures in its first."""
    rows: list[tuple[str, ...]] = []
    for split in index.splits:
        figures = split_stats(index, split)
        own = (split, str(figures["shards"]), str(figures["samples"]), f"{figures['bytes'] / 1e6:.1f}")
        for name, item in figures["modalities"].items():
            present = share(item["present"], figures["samples"])
            rows.append((*own, name, present, size(item["mean"]), size(item["largest"])))
            own = ("", "", "", "")
    return rows


def print_stats(index: Index, title: object) -> None:
    """Print a table of splits, presence and sizes."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(title)), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in HEADINGS:
        words = heading in ("split", "modality")
        table.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in stats_rows(index):
        table.add_row(*(Text(cell) for cell in row))  # Text: a name with brackets is no markup
    print_table(table, width=None)
    print(printable(summary(index)))


def summary(index: Index) -> str:
    """What an index says beside its table."""
    return (
        f"group key: {index.group_key or 'none'}   labels: {', '.join(index.labels) or 'none'}   "
        f"excluded: {len(index.excluded)}   fingerprint: {index.fingerprint[:12]}"
    )


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def share(count: int, total: int) -> str:
    """A count, and what part of all it is."""
    return f"{count} ({count / total:.0%})" if total else "0"
