"""``mmrep data index|check|stats``: describe, verify and count shards."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmrep.data.build import build_index, label_classes
from mmrep.data.decode import decode
from mmrep.data.faults import read_quarantine
from mmrep.data.index import Index, Label, Modality, check_arrays, kind_of
from mmrep.data.locations import find_shards, is_url
from mmrep.data.reader import Samples, Where, check_shards
from mmrep.errors import ConfigError, DataError, SampleError
from mmrep.printing import printable
from mmrep.progress import progress


def run(arguments: list[str]) -> int:
    """Run ``data ...``."""
    options = _parser().parse_args(arguments[1:])
    return {"index": _index, "check": _check, "stats": _stats}[options.action](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mmrep data", description="Describe, verify and count shards.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="index|check|stats")
    index = actions.add_parser(
        "index",
        help="write index.json for shards that others wrote",
        description="Write index.json for shards. Without --modality, an index that is there is made anew: it keeps "
        "modalities, splits, labels, group key and excluded samples; new shards get a split by their name.",
    )
    index.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=EXT,EXT",
        help="a modality and the extensions that carry it, as image=jpg,png; once for each",
    )
    index.add_argument("--out", metavar="DIR", help="folder of the index, where it is not the shards' own")
    index.add_argument("--group-key", help="field of the samples' json: equal values are right answers to each other")
    index.add_argument("--label-key", action="append", default=[], help="field of the samples' json that holds a class")
    index.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="QUARANTINE.csv",
        help="leave out the samples that a run listed there",
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
        action.add_argument("dir", metavar="DIR", help="folder or URL with an index.json")
    return parser


@dataclass(frozen=True)
class _Settings:
    """What an index says beyond what a scan finds; ``shards`` are those that it was made of, with their digests."""

    modalities: dict[str, Modality]
    group_key: str | None = None
    labels: dict[str, Label] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    provenance: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, Any] = field(default_factory=dict)


def _index(options: argparse.Namespace) -> int:
    found = find_shards(options.dir)
    folders = [Path(place) for place in (options.out, found.root) if place is not None and not is_url(place)]
    if options.out is not None and is_url(options.out):
        raise ConfigError("an index is written into a folder", where=options.out, fix="give --out DIR")
    settings = _Settings(_modalities(options.modality)) if options.modality else _earlier_settings(folders)
    if not settings.modalities:
        raise ConfigError("no modality is named", fix="add --modality image=jpg,png --modality text=txt, say")
    for folder in folders[:1]:
        _check_writable(folder)
    excluded = settings.excluded | _quarantined(options.exclude, settings)
    remote = is_url(found.root)
    with progress(
        "fetching and scanning" if remote else "scanning", len(found.names) * (1 + remote), "shards"
    ) as advance:
        index = build_index(
            options.dir,
            settings.modalities,
            out=options.out,
            group_key=options.group_key or settings.group_key,
            labels=settings.labels,
            exclude=excluded,
            provenance=settings.provenance,
            licences=settings.licences,
            workers=options.workers,
            progress=advance,
        )
    if options.exclude and set(index.excluded) <= settings.excluded:
        print(f"no sample of {', '.join(options.exclude)} is in these shards, or all are left out already")
    index = replace(index, splits=_splits(index, settings))
    if options.group_key:
        _check_field(index, options.group_key)
    labels = {
        key: replace(index.labels.get(key, Label([])), classes=label_classes(index, key)) for key in options.label_key
    }
    index = replace(index, labels=index.labels | labels)
    path = index.save()
    if empty := [shard.name for shard in index.shards if not shard.samples]:
        print(printable(f"without a sample: {_few(empty)}"))
    samples = sum(shard.samples for shard in index.shards)
    without = f", without {len(index.excluded)} excluded" if index.excluded else ""
    splits = printable(", ".join(index.splits))
    print(f"{path}: {samples} samples in {len(index.shards)} shards, splits {splits}{without}")
    return 0


def _modalities(texts: Sequence[str]) -> dict[str, Modality]:
    modalities: dict[str, Modality] = {}
    for text in texts:
        name, equals, extensions = text.partition("=")
        listed = tuple(part.strip().lstrip(".").lower() for part in extensions.split(",") if part.strip())
        if not equals or not name or not listed:
            raise ConfigError(f"--modality {text}", fix="write it as image=jpg,png")
        if name in modalities:
            raise ConfigError(f"modality '{name}' is named twice", fix=f"write --modality {name}=EXT,EXT once")
        modalities[name] = Modality(listed, kind_of(listed[0]))
    return modalities


def _earlier_settings(folders: Sequence[Path]) -> _Settings:
    """Of the first index that is there, one of an older format too."""
    path = next((folder / "index.json" for folder in folders if (folder / "index.json").is_file()), None)
    if path is None:
        return _Settings({})
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _Settings(
            {name: Modality(tuple(item["extensions"]), item["kind"]) for name, item in content["modalities"].items()},
            content["group_key"],
            {name: Label(**label) for name, label in content["labels"].items()},
            {split: [str(name) for name in names] for split, names in content["splits"].items()},
            {str(shard["name"]): str(shard["sha256"]) for shard in content["shards"]},
            frozenset(content.get("excluded", ())),
            dict(content["provenance"]),
            dict(content["licences"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"broken index ({error})", where=path, fix="name the modalities: --modality NAME=EXT"
        ) from error


def _splits(index: Index, earlier: _Settings) -> dict[str, list[str]]:
    """The earlier splits without shards that are gone; a new shard is where its name says."""
    names, known = {shard.name for shard in index.shards}, set(earlier.shards)
    splits = {split: [name for name in members if name in names] for split, members in earlier.splits.items()}
    for split, members in index.splits.items():
        if new := [name for name in members if name not in known]:
            splits[split] = splits.get(split, []) + new
            if known:
                print(printable(f"new in split {split}: {_few(new)}"))
    if gone := [name for name in earlier.shards if name not in names]:
        print(printable(f"not there any more: {_few(gone)}"))
    if empty := [split for split, members in splits.items() if not members]:
        print(printable(f"splits of which nothing is left: {', '.join(empty)}"))
    return {split: members for split, members in splits.items() if members}


def _quarantined(files: Sequence[str], earlier: _Settings) -> frozenset[str]:
    """``shard:key`` of the samples in quarantine files, but those of a shard that only has the same name, in a blend say.

    Which one a run met says its digest in the index that the run had; the shard itself may have been damaged since.
    """
    faults = [fault for file in files for fault in read_quarantine(Path(file))]
    return frozenset(
        f"{fault.shard}:{fault.key}"
        for fault in faults
        if fault.sha256 in ("", earlier.shards.get(fault.shard, fault.sha256))
    )


def _check_writable(folder: Path) -> None:
    """Fail before the scan, not after it."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError("no index can be written there", where=folder, fix="give another --out DIR")


def _check_field(index: Index, key: str) -> None:
    """Refuse a group key that no sample has: a misspelt one would say without a word that no two samples match."""
    for split in index.splits:
        samples = Samples(index, split)
        for number in range(len(samples)):
            if samples.has(number, "json"):
                with suppress(SampleError):
                    record = decode("json", "json", samples.read(number, "json"), Where(samples, number))
                    if isinstance(record, dict) and record.get(key) is not None:
                        return
    raise DataError(f"no sample's json has the field '{key}'", where=index.root, fix="mend --group-key")


def _check(options: argparse.Namespace) -> int:
    index = Index.load(options.dir)
    check_arrays(index)
    broken = []
    with progress("checking", len(index.shards), "shards") as advance:
        for shard, fault in check_shards(index):
            if fault is not None:
                broken.append((shard.name, fault))
            advance(1)
    for name, message in broken:
        print(printable(f"{name}: {message}"))
    if broken:
        raise DataError(
            f"{len(broken)} of {len(index.shards)} shards are not what the index says: {_few([name for name, _ in broken])}",
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


def _few(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
