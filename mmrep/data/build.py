"""Making an index of shards that are there: one pass over each, several at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmrep.data.decode import decode
from mmrep.data.index import Index, Label, Modality, Shard
from mmrep.data.locations import find_shards, is_url, join
from mmrep.data.member_table import MemberTable
from mmrep.data.reader import Samples
from mmrep.data.scan import ScannedShard, is_decodable, scan_shards
from mmrep.data.shard_cache import ShardCache
from mmrep.errors import DataError

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,1000}")
"""Of a class; longer ones are no numbers that anybody counts by."""


def build_index(
    place: Path | str,
    modalities: Mapping[str, Modality],
    *,
    out: Path | str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    group_key: str | None = None,
    labels: Mapping[str, Label] | None = None,
    exclude: Iterable[str] = (),
    provenance: Mapping[str, Any] | None = None,
    licences: Mapping[str, Any] | None = None,
    workers: int = 1,
    cache: ShardCache | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Index:
    """Scan shards and describe them. Nothing is written: see `Index.save`.

    Args:
        place: Folder of the shards, or a pattern: see `mmrep.data.locations.find_shards`.
        modalities: Name -> how it is stored.
        out: Folder of the index, where it is not the shards'.
        splits: Split -> shard names; by default a shard's split is its name up to the number ("train-0001.tar"), or its
            subfolder ("train/0001.tar").
        group_key: Field of the samples' JSON; samples with equal values are right answers to each other.
        labels: Fields of the samples' JSON that hold a class (by name, or by number in ``classes``).
        exclude: ``shard:key`` of samples to leave out.
        workers: Processes that scan.
        cache: Where remote shards are kept.
        progress: Called with 1 for each shard that is scanned, and before that for each that is fetched.

    Raises:
        DataError: If there are no shards, one is damaged or has a name that is no UTF-8, or a modality is in none of them.
    """
    found = find_shards(str(place))
    if odd := [name for name in found.names if any("\ud800" <= character <= "\udfff" for character in name)]:
        raise DataError(f"the name of a shard is no UTF-8: {odd[0]!a}", where=place, fix="rename it")
    folder = Path(out) if out is not None else Path(found.root)
    if is_url(found.root) and out is None:
        raise DataError("the index of remote shards needs a folder of its own", where=place, fix="give --out DIR")
    source = (
        None if folder.resolve() == Path(found.root).resolve() and not is_url(found.root) else _absolute(found.root)
    )
    scanned = _scan(found.root, found.names, workers, cache, progress)
    left_out = set(exclude)
    met = (f"{name}:{key}" for name, shard in zip(found.names, scanned, strict=True) for key, _ in shard.samples)
    excluded = tuple(sorted(sample for sample in met if sample in left_out))
    extensions = tuple(
        sorted({e for shard in scanned for _, members in shard.samples for e in members if is_decodable(e)})
    )
    shards, tables = [], []
    for name, shard in zip(found.names, scanned, strict=True):
        kept = _without(shard, name, excluded)
        shards.append(Shard(name, shard.bytes, shard.sha256, len(kept.samples), kept.extension_sets()))
        tables.append(kept.table(extensions))
    for modality, stored in modalities.items():
        if not set(extensions).intersection(stored.extensions):
            raise DataError(
                f"no member has an extension of modality '{modality}'",
                where=place,
                fix=f"there are: {list(extensions)}",
            )
    return Index(
        folder,
        tuple(shards),
        dict(modalities),
        {name: list(members) for name, members in (splits or _splits_by_name(found.names)).items()},
        extensions,
        MemberTable.concatenate(tables),
        source,
        group_key,
        dict(labels or {}),
        excluded,
        dict(provenance or {}),
        dict(licences or {}),
    )


def _scan(
    root: str, names: Sequence[str], workers: int, cache: ShardCache | None, progress: Callable[[int], None]
) -> list[ScannedShard]:
    paths, scanned = [], []
    for name in names:
        if is_url(root):
            paths.append((cache or ShardCache()).add(join(root, name)))
            progress(1)
        else:
            paths.append(Path(root) / name)
    for shard in scan_shards(paths, workers=workers):
        scanned.append(shard)
        progress(1)
    return scanned


def _without(shard: ScannedShard, name: str, excluded: Sequence[str]) -> ScannedShard:
    if not excluded:
        return shard
    left_out = set(excluded)
    return replace(shard, samples=[sample for sample in shard.samples if f"{name}:{sample[0]}" not in left_out])


def label_classes(index: Index, key: str) -> list[str]:
    """All values that a field of the samples' JSON takes, in the order of `sorted_classes`: the classes of a label.

    Raises:
        DataError: If no sample has the field.
    """
    found: set[str] = set()
    for split in index.splits:
        samples = Samples(index, split)
        for number in range(len(samples)):
            if samples.has(number, "json"):
                record = decode("json", "json", samples.read(number, "json"), samples.where(number))
                if isinstance(record, dict) and record.get(key) is not None:
                    found.add(str(record[key]))
    if not found:
        raise DataError(f"no sample's json has the field '{key}'", where=index.root)
    return sorted_classes(found)


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in order: by value (0, 1, 2, 10) where all are whole numbers, else as text.

    A file of other names gives them by their places, and the line of class 10 is looked for after that of class 9.
    """
    names = set(names)
    if all(WHOLE_NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _absolute(root: str) -> str:
    return root if is_url(root) else str(Path(root).resolve())


def _splits_by_name(names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        stem = re.sub(r"[-_.]?\d*\.tar$", "", file)
        splits.setdefault(stem or folder.replace("/", "-") or "train", []).append(name)
    return splits
