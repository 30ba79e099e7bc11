"""``mmrep data index|check|stats``: describe, verify and count shards."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmrep.data.build import build_index, label_classes
from mmrep.data.faults import read_quarantine
from mmrep.data.index import Index, Label, Modality, check_arrays, kind_of
from mmrep.data.locations import is_url
from mmrep.data.reader import check_shard
from mmrep.errors import ConfigError, DataError


def run(arguments: list[str]) -> int:
    """Run ``data ...``."""
    options = _parser().parse_args(arguments[1:])
    return {"index": _index, "check": _check, "stats": _stats}[options.action](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrep data", description="Describe, verify and count shards.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="index|check|stats")
    index = actions.add_parser("index", help="write index.json for shards that others wrote")
    index.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=EXT,EXT",
        help="a modality and the extensions that carry it, as image=jpg,png; once for each; by default those of an index that is there",
    )
    index.add_argument("--out", help="folder of the index, where it is not the shards' own")
    index.add_argument("--group-key", help="field of the samples' json: equal values are right answers to each other")
    index.add_argument("--label-key", action="append", default=[], help="field of the samples' json that holds a class")
    index.add_argument(
        "--exclude", action="append", default=[], metavar="FILE.csv", help="a quarantine file: leave out its samples"
    )
    index.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="shards read at a time (default: all cores)"
    )
    index.add_argument(
        "dir", metavar="DIR_OR_PATTERN", help="folder of the shards, or 'train-{000..099}.tar', or such a URL"
    )
    check = actions.add_parser("check", help="verify size, digest and structure of every shard")
    stats = actions.add_parser("stats", help="print splits, modalities, presence and sizes")
    stats.add_argument("--html", metavar="FILE", help="write a page with the table and some samples of each split")
    stats.add_argument("--overwrite", action="store_true", help="replace an existing page")
    for action in (check, stats):
        action.add_argument("dir", metavar="DIR", help="folder with an index.json")
    return parser


def _index(options: argparse.Namespace) -> int:
    kept = {} if options.modality else _earlier_settings(options)
    modalities = dict(_modality(text) for text in options.modality) or kept.pop("modalities", {})
    if not modalities:
        raise ConfigError("no modality is named", fix="add --modality image=jpg,png --modality text=txt, say")
    exclude = {f"{fault.shard}:{fault.key}" for file in options.exclude for fault in read_quarantine(Path(file))}
    if options.group_key:
        kept["group_key"] = options.group_key
    kept["exclude"] = exclude | set(kept.get("exclude", ()))
    with _progress("shards") as advance:
        index = build_index(options.dir, modalities, out=options.out, workers=options.workers, progress=advance, **kept)
    labels = {key: Label(label_classes(index, key)) for key in options.label_key}
    index = replace(index, labels=index.labels | labels)
    path = index.save()
    samples = sum(shard.samples for shard in index.shards)
    without = f", without {len(index.excluded)} excluded" if index.excluded else ""
    print(f"{path}: {samples} samples in {len(index.shards)} shards, splits {', '.join(index.splits)}{without}")
    return 0


def _earlier_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What an index that is there says beyond its shards, of an older format too: made anew, it keeps that."""
    folder = Path(options.out or options.dir)
    path = folder / "index.json"
    if (options.out is None and is_url(options.dir)) or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            "modalities": {n: Modality(tuple(m["extensions"]), m["kind"]) for n, m in content["modalities"].items()},
            "splits": content["splits"],
            "group_key": content["group_key"],
            "labels": {name: Label(**label) for name, label in content["labels"].items()},
            "exclude": content.get("excluded", []),
            "provenance": content["provenance"],
            "licences": content["licences"],
        }
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise DataError(
            f"broken index ({error})", where=path, fix="name the modalities: --modality NAME=EXT"
        ) from error


def _modality(text: str) -> tuple[str, Modality]:
    name, equals, extensions = text.partition("=")
    listed = tuple(extension.strip().lstrip(".") for extension in extensions.split(",") if extension.strip())
    if not equals or not name or not listed:
        raise ConfigError(f"--modality {text}", fix="write it as image=jpg,png")
    return name, Modality(listed, kind_of(listed[0]))


def _check(options: argparse.Namespace) -> int:
    index = Index.load(options.dir)
    check_arrays(index)
    broken = []
    with _progress("shards") as advance:
        for done, shard in enumerate(index.shards, start=1):
            try:
                check_shard(index, shard)
            except DataError as error:
                broken.append(str(error))
            advance(done, len(index.shards))
    for line in broken:
        print(line)
    if broken:
        raise DataError(
            f"{len(broken)} of {len(index.shards)} shards are not what the index says",
            where=options.dir,
            fix="copy them again, or make the index anew: mmrep data index",
        )
    print(f"{options.dir}: {len(index.shards)} shards are as the index says")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from mmrep.data.stats import print_stats

    if options.html and Path(options.html).exists() and not options.overwrite:
        raise ConfigError("the page exists", where=options.html, fix="add --overwrite, or another --html")
    index = Index.load(options.dir)
    print_stats(index, options.dir)
    if options.html:
        from mmrep.data.contact_sheet import write_contact_sheet

        print(f"page in {write_contact_sheet(index, Path(options.html))}")
    return 0


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal, nothing elsewhere; gives the function that says how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
