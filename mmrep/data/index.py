"""`index.json` and the arrays beside it: what says which samples are in the shards, and where their bytes lie.

`mmrep.data.build` makes it in one pass over the shards; `Index.load` reads it and refuses what it cannot trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmrep.data.decode import KINDS
from mmrep.data.locations import is_url, join
from mmrep.data.member_table import AGAIN, FILES, MemberTable
from mmrep.data.scan import sha256
from mmrep.data.shard_cache import ShardCache, download, retried
from mmrep.errors import DataError, did_you_mean

FORMAT = "mmrep-index-2"
MAX_INDEX_BYTES = 1 << 30


@dataclass(frozen=True)
class Modality:
    """How a modality is stored: the member extensions that may carry it, and its kind (a key of `KINDS`)."""

    extensions: tuple[str, ...]
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown kind of modality '{self.kind}'", fix=did_you_mean(self.kind, KINDS))
        for extension in self.extensions:
            if extension.rsplit(".", 1)[-1] not in KINDS[self.kind]:
                raise DataError(f"'.{extension}' is no {self.kind} format", fix=f"use {', '.join(KINDS[self.kind])}")


@dataclass(frozen=True)
class Label:
    """Classes of a label field of the samples' JSON, and the prompt templates (``{c}`` is the class)."""

    classes: list[str]
    templates: list[str] = field(default_factory=lambda: ["{c}"])


@dataclass(frozen=True)
class Shard:
    """One tar.

    Attributes:
        name: Relative to where the shards are.
        bytes, sha256: Of the file.
        samples: How many it holds.
        presence: How many of them have which set of extensions: ``{"jpg+txt": 9, "txt": 1}``.
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    presence: dict[str, int]


@dataclass(frozen=True)
class Index:
    """The contents of an index.json, its arrays, and the folder they lie in.

    Attributes:
        folder: Where index.json is.
        shards: The tars, in the order of the arrays' rows.
        modalities: Name -> how it is stored.
        splits: Split -> names of its shards.
        extensions: Columns of the arrays.
        source: Folder or URL of the shards; None where they lie beside index.json.
        group_key: Field of the samples' JSON; samples with equal values are right answers to each other.
        labels: Fields of the samples' JSON that hold a class.
        excluded: ``shard:key`` of samples that are left out.
        provenance, licences: What the data set's maker says of it.
        table: Where the members lie.
    """

    folder: Path
    shards: tuple[Shard, ...]
    modalities: dict[str, Modality]
    splits: dict[str, list[str]]
    extensions: tuple[str, ...]
    table: MemberTable = field(repr=False, compare=False)
    source: str | None = None
    group_key: str | None = None
    labels: dict[str, Label] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A digest of all shards: two indexes with the same fingerprint hold the same samples in the same order."""
        return _fingerprint(self.shards, self.excluded)

    @property
    def root(self) -> str:
        """Folder or URL of the shards."""
        return self.source or str(self.folder)

    @property
    def arrays(self) -> Path:
        """Folder of the arrays: its name says which shards they are of."""
        return self.folder / _arrays_name(self.fingerprint)

    def split(self, name: str) -> list[Shard]:
        """The shards of a split.

        Raises:
            DataError: If there is no such split.
        """
        if name not in self.splits:
            raise DataError(f"no split '{name}'", where=self.folder, fix=did_you_mean(name, self.splits))
        by_name = {shard.name: shard for shard in self.shards}
        return [by_name[shard] for shard in self.splits[name]]

    def save(self) -> Path:
        """Write the arrays and ``index.json``, each beside and renamed; the JSON last: it never names what is not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f"{self.arrays.name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        self.table.save(beside)
        content = {
            "format": FORMAT,
            **{name: value for name, value in _plain(self).items() if name not in ("folder", "table")},
            "arrays": {
                name: {"bytes": (beside / name).stat().st_size, "sha256": sha256(beside / name)} for name in FILES
            },
            "fingerprint": self.fingerprint,
        }
        shutil.rmtree(self.arrays, ignore_errors=True)
        beside.replace(self.arrays)
        path = self.folder / "index.json"
        part = path.with_suffix(".json.part")
        part.write_text(
            json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n",
            encoding="utf-8",
            errors="backslashreplace",
        )
        part.replace(path)
        remove_arrays(self.folder, but=self.arrays)
        return path

    @classmethod
    def load(cls, place: Path | str, cache: ShardCache | None = None) -> Index:
        """Read the index.json of a folder or URL (or that file itself), and map its arrays.

        Args:
            place: The folder or URL.
            cache: Where to keep the index of a URL.

        Raises:
            DataError: If there is none, or it is not one that mmrep wrote.
        """
        if is_url(str(place)):
            return _load_remote(str(place).removesuffix("index.json").rstrip("/"), cache or ShardCache())
        path = Path(place)
        path = path / "index.json" if path.suffix != ".json" else path
        if not path.is_file():
            raise DataError("no index.json", where=path.parent, fix=_missing_advice(path.parent))
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise DataError(f"an index of {path.stat().st_size} bytes", where=path, fix=AGAIN)
        return _read(path)


def kind_of(extension: str) -> str:
    """The kind of modality that an extension carries.

    Raises:
        DataError: If no kind allows it.
    """
    for kind, extensions in KINDS.items():
        if extension.rsplit(".", 1)[-1] in extensions:
            return kind
    known = [extension for extensions in KINDS.values() for extension in extensions]
    raise DataError(f"no decoder for '.{extension}'", fix=did_you_mean(extension, known))


def _plain(index: Index) -> dict[str, Any]:
    plain = {name: getattr(index, name) for name in index.__dataclass_fields__}
    plain["shards"] = [asdict(shard) for shard in index.shards]
    plain["modalities"] = {name: asdict(modality) for name, modality in index.modalities.items()}
    plain["labels"] = {name: asdict(label) for name, label in index.labels.items()}
    return plain


def _read(path: Path, source: str | None = None, arrays: Path | None = None) -> Index:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _parse(content, path.parent, source, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"broken index ({error})", where=path, fix=AGAIN) from error


def _parse(content: dict[str, Any], folder: Path, source: str | None, arrays: Path | None) -> Index:
    if content["format"] != FORMAT:
        fix = f"this version reads {FORMAT}; {AGAIN} {folder} keeps its modalities, splits and labels"
        raise DataError(f"an index of format '{content['format']}'", where=folder, fix=fix)
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for name in (shard.name for shard in shards):
        if name.startswith("/") or ".." in name.split("/") or ":" in name:
            raise DataError(f"the index names a shard outside its folder, {name!r}", where=folder)
    if content["fingerprint"] != _fingerprint(shards, content["excluded"]):
        raise DataError("the index does not match its own fingerprint", where=folder, fix=AGAIN)
    table = _load_table(content, arrays or folder / _arrays_name(content["fingerprint"]))
    index = Index(
        folder,
        shards,
        {name: Modality(tuple(item["extensions"]), item["kind"]) for name, item in content["modalities"].items()},
        {name: list(members) for name, members in content["splits"].items()},
        tuple(content["extensions"]),
        table,
        _source(content["source"], source),
        content["group_key"],
        {name: Label(**label) for name, label in content["labels"].items()},
        tuple(content["excluded"]),
        content["provenance"],
        content["licences"],
    )
    _check_consistent(index)
    return index


def _source(named: str | None, fetched_from: str | None) -> str | None:
    """Where the shards are; an index from elsewhere may name a URL, but no folder of this machine."""
    if named is not None and (is_url(named) or fetched_from is None):
        return named
    return fetched_from


def _fingerprint(shards: Iterable[Shard], excluded: Iterable[str]) -> str:
    lines = "".join(f"{shard.name} {shard.sha256}\n" for shard in shards)
    lines += "".join(f"without {sample}\n" for sample in excluded)
    return hashlib.sha256(lines.encode()).hexdigest()


def _check_consistent(index: Index) -> None:
    if twice := _repeated([shard.name for shard in index.shards]):
        raise DataError(f"the index has two shards of one name: {twice}", where=index.folder, fix=AGAIN)
    for split, names in index.splits.items():
        if twice := _repeated(names):
            fix = "name each once under splits in index.json"
            raise DataError(f"split '{split}' names shards twice: {twice}", where=index.folder, fix=fix)
    if unknown := {name for names in index.splits.values() for name in names} - {shard.name for shard in index.shards}:
        raise DataError(f"a split names shards that the index lacks: {sorted(unknown)}", where=index.folder)
    for shard in index.shards:
        counts = (shard.bytes, shard.samples, *shard.presence.values())
        if not all(type(count) is int and count >= 0 for count in counts):
            raise DataError("a size or count is no whole number", where=f"{index.folder}:{shard.name}", fix=AGAIN)
    for name, label in index.labels.items():
        if not isinstance(label.classes, list) or not isinstance(label.templates, list):
            raise DataError(
                f"label '{name}' has no list of classes or templates", where=index.folder, fix="mend it in index.json"
            )
    if not isinstance(index.group_key, str | None):
        raise DataError("group_key is no text", where=index.folder, fix="mend it in index.json")
    if len(index.table) != sum(shard.samples for shard in index.shards):
        raise DataError("the arrays of the index are not of its shards", where=index.folder, fix=AGAIN)
    for shard in index.shards:
        named = {extension for extensions in shard.presence for extension in extensions.split("+") if extension}
        if sum(shard.presence.values()) != shard.samples or not named <= set(index.extensions):
            raise DataError("the index contradicts itself", where=f"{index.folder}:{shard.name}", fix=AGAIN)


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, times in Counter(names).items() if times > 1)


def _load_table(content: dict[str, Any], folder: Path) -> MemberTable:
    for name in FILES:
        path = folder / name
        if not path.is_file() or path.stat().st_size != content["arrays"][name]["bytes"]:
            raise DataError(f"the index lacks its array {name}, or it is cut short", where=folder, fix=AGAIN)
    return MemberTable.load(folder, content["extensions"])


def remove_arrays(folder: Path, but: Path | None = None) -> None:
    """Remove the arrays of indexes of a folder, those in ``but`` aside."""
    for arrays in folder.glob("index-" + "[0-9a-f]" * 16):
        if arrays != but:
            shutil.rmtree(arrays, ignore_errors=True)


def check_arrays(index: Index) -> None:
    """Compare the arrays with the digests in index.json.

    Raises:
        DataError: If one has changed.
    """
    content = json.loads((index.folder / "index.json").read_text(encoding="utf-8"))
    for name in FILES:
        if sha256(index.arrays / name) != content["arrays"][name]["sha256"]:
            raise DataError(f"the array {name} of the index has changed", where=index.arrays, fix=AGAIN)


def _load_remote(root: str, cache: ShardCache) -> Index:
    """The index of a URL, copied into the cache."""
    folder = cache.folder / "indexes" / hashlib.sha256(root.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"index.json.{os.getpid()}.part"
    retried(lambda: download(join(root, "index.json"), part, MAX_INDEX_BYTES), root)
    try:
        content = json.loads(part.read_text(encoding="utf-8"))
        fingerprint, sizes = str(content["fingerprint"]), content["arrays"]
        if content["format"] != FORMAT or not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
            raise DataError("no index that this version reads", where=root, fix=AGAIN)
        copies = {
            name: cache.get(
                join(root, f"{_arrays_name(fingerprint)}/{name}"), sizes[name]["sha256"], sizes[name]["bytes"]
            )
            for name in FILES
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"broken index ({error})", where=root, fix=AGAIN) from error
    arrays = folder / _arrays_name(fingerprint)
    arrays.mkdir(exist_ok=True)
    for name, copy in copies.items():
        # Linked, so that the cache may drop its own name.
        beside = arrays / f"{name}.{os.getpid()}.part"
        beside.unlink(missing_ok=True)
        os.link(copy, beside)
        beside.replace(arrays / name)
    path = folder / "index.json"
    part.replace(path)
    return _read(path, source=root)


def _arrays_name(fingerprint: str) -> str:
    return f"index-{fingerprint[:16]}"


def _missing_advice(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if any(folder.rglob("*.tar")):
        return f"make one: mmrep data index {folder} --modality image=jpg,png --modality text=txt"
    return "there are no shards either"
