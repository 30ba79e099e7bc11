"""`index.json`: what lies beside the shards and says what is in them.

`build_index` makes it in one pass over the shards; `Index.load` reads it and refuses what it cannot trust.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmrep.data.decode import decode
from mmrep.data.tar import Member, walk
from mmrep.errors import DataError, did_you_mean

FORMAT = "mmrep-index-1"
KINDS: dict[str, tuple[str, ...]] = {
    "image": ("png", "jpg", "jpeg", "webp"),
    "text": ("txt",),
    "audio": ("flac", "wav", "ogg", "mp3"),
    "array": ("npy",),
}
"""What a modality can be, and the extensions that may carry it: the allow-list of formats."""

UNSAFE_EXTENSIONS = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "npz", "gz", "bin"})
"""Formats that other readers unpickle or unpack without a bound: a shard with them is refused."""


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
    """One tar: its name relative to the index, its size, its digest, and how many samples it holds."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Index:
    """The contents of an index.json, and the folder it lies in."""

    folder: Path
    shards: tuple[Shard, ...]
    modalities: dict[str, Modality]
    splits: dict[str, list[str]]
    group_key: str | None = None
    labels: dict[str, Label] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A digest of all shards: two indexes with the same fingerprint hold the same samples in the same order."""
        lines = "".join(f"{shard.name} {shard.sha256}\n" for shard in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()

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
        """Write ``index.json`` beside the shards, by a temporary file and a rename."""
        content = {"format": FORMAT, **asdict(self), "fingerprint": self.fingerprint}
        del content["folder"]
        path = self.folder / "index.json"
        beside = path.with_suffix(".json.part")
        beside.write_text(json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return beside.replace(path)

    @classmethod
    def load(cls, folder: Path | str) -> Index:
        """Read ``folder/index.json`` (or that file itself).

        Raises:
            DataError: If there is none, or it is not one that mmrep wrote.
        """
        path = Path(folder)
        path = path / "index.json" if path.suffix != ".json" else path
        if not path.is_file():
            raise DataError("no index.json", where=path.parent, fix=_missing_advice(path.parent))
        try:
            return _parse(json.loads(path.read_text(encoding="utf-8")), path.parent)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise DataError(f"broken index ({error})", where=path, fix="make it anew: mmrep data index") from error


def build_index(
    folder: Path | str,
    modalities: Mapping[str, Modality],
    *,
    splits: Mapping[str, Sequence[str]] | None = None,
    group_key: str | None = None,
    labels: Mapping[str, Label] | None = None,
    provenance: Mapping[str, Any] | None = None,
    licences: Mapping[str, Any] | None = None,
) -> Index:
    """Scan all tars below a folder and describe them. Nothing is written: see `Index.save`.

    Args:
        folder: Where the shards are.
        modalities: Name -> how it is stored.
        splits: Split -> shard names; by default a shard's split is its name up to the number ("train-0001.tar"), or its
            subfolder ("train/0001.tar").
        group_key: Field of the samples' JSON; samples with equal values are right answers to each other.
        labels: Fields of the samples' JSON that hold a class (by name, or by number in ``classes``).

    Raises:
        DataError: If there are no shards, one is damaged, or a modality is in none of them.
    """
    root = Path(folder)
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.tar"))
    if not names:
        raise DataError("no shards (*.tar)", where=root, fix="give the folder that holds them")
    shards, seen = [], set[str]()
    for name in names:
        samples = list(group_members(root / name))
        seen.update(extension for _, members in samples for extension in members)
        shards.append(Shard(name, (root / name).stat().st_size, sha256(root / name), len(samples)))
    for modality, stored in modalities.items():
        if not seen.intersection(stored.extensions):
            raise DataError(
                f"no member has an extension of modality '{modality}'", where=root, fix=f"there are: {sorted(seen)}"
            )
    by_split = {name: list(members) for name, members in (splits or _splits_by_name(names)).items()}
    return Index(
        root,
        tuple(shards),
        dict(modalities),
        by_split,
        group_key,
        dict(labels or {}),
        dict(provenance or {}),
        dict(licences or {}),
    )


def group_members(shard: Path) -> list[tuple[str, dict[str, Member]]]:
    """The samples of a shard, in order: ``(key, {extension: member})``, by WebDataset's convention.

    A sample's members lie side by side and share the name up to the first dot of the file name.

    Raises:
        DataError: On a key that appears in two places, a repeated extension, or an unsafe format.
    """
    samples: list[tuple[str, dict[str, Member]]] = []
    keys: set[str] = set()
    for member in walk(shard):
        folder, _, file = member.name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not dot or not stem:
            continue  # WebDataset reads no sample from a name without an extension, a README say
        extension = extension.lower()
        if extension.rsplit(".", 1)[-1] in UNSAFE_EXTENSIONS or extension.startswith("__"):
            raise DataError(
                f"'{member.name}' is of an unsafe format", where=shard, fix="store png, jpg, txt, flac, npy or json"
            )
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1][0] != key:
            if key in keys:
                raise DataError(
                    f"the members of sample '{key}' do not lie side by side", where=shard, fix="sort them by name"
                )
            keys.add(key)
            samples.append((key, {}))
        if extension in samples[-1][1]:
            raise DataError(f"sample '{key}' has two members .{extension}", where=shard)
        samples[-1][1][extension] = member
    return samples


def label_classes(folder: Path | str, key: str) -> list[str]:
    """All values that a field of the samples' JSON takes, sorted: the classes of a label.

    Raises:
        DataError: If no sample has the field.
    """
    found: set[str] = set()
    for path in sorted(Path(folder).rglob("*.tar")):
        for name, members in group_members(path):
            if (member := members.get("json")) is not None:
                with path.open("rb") as file:
                    file.seek(member.offset)
                    record = decode("json", "json", file.read(member.size), f"{path}:{name}")
                if isinstance(record, dict) and record.get(key) is not None:
                    found.add(str(record[key]))
    if not found:
        raise DataError(f"no sample's json has the field '{key}'", where=folder)
    return sorted(found)


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


def _parse(content: dict[str, Any], folder: Path) -> Index:
    if content["format"] != FORMAT:
        raise DataError(f"an index of format '{content['format']}'", where=folder, fix=f"this version reads {FORMAT}")
    shards = tuple(Shard(**shard) for shard in content["shards"])
    for name in (shard.name for shard in shards):
        if name.startswith("/") or ".." in name.split("/") or ":" in name:
            raise DataError(f"the index names a shard outside its folder, {name!r}", where=folder)
    index = Index(
        folder,
        shards,
        {name: Modality(tuple(item["extensions"]), item["kind"]) for name, item in content["modalities"].items()},
        {name: list(members) for name, members in content["splits"].items()},
        content["group_key"],
        {name: Label(**label) for name, label in content["labels"].items()},
        content["provenance"],
        content["licences"],
    )
    if index.fingerprint != content["fingerprint"]:
        raise DataError(
            "the index does not match its own fingerprint", where=folder, fix="make it anew: mmrep data index"
        )
    if unknown := {name for names in index.splits.values() for name in names} - {shard.name for shard in shards}:
        raise DataError(f"a split names shards that the index lacks: {sorted(unknown)}", where=folder)
    return index


def _missing_advice(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if any(folder.rglob("*.tar")):
        return f"make one: mmrep data index {folder} --modality image=jpg,png --modality text=txt"
    return "there are no shards either"


def _splits_by_name(names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        stem = re.sub(r"[-_.]?\d*\.tar$", "", file)
        splits.setdefault(stem or folder.replace("/", "-") or "train", []).append(name)
    return splits


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
