"""``mmrep data index|check|stats``: describe, verify and count shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmrep.data.index import Index, Label, Modality, build_index, kind_of, label_classes
from mmrep.data.reader import Samples, check_shard
from mmrep.errors import ConfigError


def run(arguments: list[str]) -> int:
    """Run ``data ...``."""
    options = _parser().parse_args(arguments[1:])
    folder = Path(options.dir)
    {"index": _index, "check": _check, "stats": _stats}[options.action](folder, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrep data", description="Describe, verify and count shards.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="index|check|stats")
    index = actions.add_parser("index", help="write index.json for shards that others wrote")
    index.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=EXT,EXT",
        help="a modality and the extensions that carry it, as image=jpg,png; once for each",
    )
    index.add_argument("--group-key", help="field of the samples' json: equal values are right answers to each other")
    index.add_argument("--label-key", action="append", default=[], help="field of the samples' json that holds a class")
    check = actions.add_parser("check", help="verify size, digest and structure of every shard")
    stats = actions.add_parser("stats", help="print splits, modalities and presence")
    for action in (index, check, stats):
        action.add_argument("dir", metavar="DIR", help="folder of the shards")
    return parser


def _index(folder: Path, options: argparse.Namespace) -> None:
    if not options.modality:
        raise ConfigError("no modality is named", fix="add --modality image=jpg,png --modality text=txt, say")
    modalities = dict(_modality(text) for text in options.modality)
    labels = {key: Label(label_classes(folder, key)) for key in options.label_key}
    index = build_index(folder, modalities, group_key=options.group_key, labels=labels)
    path = index.save()
    samples = sum(shard.samples for shard in index.shards)
    print(f"{path}: {samples} samples in {len(index.shards)} shards, splits {', '.join(index.splits)}")


def _modality(text: str) -> tuple[str, Modality]:
    name, equals, extensions = text.partition("=")
    listed = tuple(extension.strip().lstrip(".") for extension in extensions.split(",") if extension.strip())
    if not equals or not name or not listed:
        raise ConfigError(f"--modality {text}", fix="write it as image=jpg,png")
    return name, Modality(listed, kind_of(listed[0]))


def _check(folder: Path, options: argparse.Namespace) -> None:
    index = Index.load(folder)
    for shard in index.shards:
        check_shard(index.folder / shard.name, shard)
    print(f"{folder}: {len(index.shards)} shards are as the index says")


def _stats(folder: Path, options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    index = Index.load(folder)
    table = Table(title=str(folder))
    for heading in ("split", "shards", "samples", "MB", *index.modalities):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split in index.splits:
        samples, shards = Samples(index, split), index.split(split)
        present = [
            sum(samples.extension_of(number, name) is not None for number in range(len(samples)))
            for name in index.modalities
        ]
        megabytes = f"{sum(shard.bytes for shard in shards) / 1e6:.1f}"
        table.add_row(
            split, str(len(shards)), str(len(samples)), megabytes, *(_share(n, len(samples)) for n in present)
        )
    console = Console()
    console.print(table)
    console.print(
        f"group key: {index.group_key or 'none'}   labels: {', '.join(index.labels) or 'none'}   "
        f"fingerprint: {index.fingerprint[:12]}",
        highlight=False,
    )


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"
