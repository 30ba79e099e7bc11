"""`manifest.json`: what says which embeddings a folder holds, of which data, by which model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmrep.data.locations import is_url
from mmrep.errors import ConfigError, DataError
from mmrep.files import replacing
from mmrep.model import MultimodalModel

FORMAT = "mmrep-embeddings-1"
NAME = "manifest.json"
AGAIN = "run the same `mmrep embed` again"


@dataclass(frozen=True)
class Source:
    """What was embedded, by what, and how it is stored: equal for all processes that write one folder.

    Attributes:
        model_config, model: sha256 of the model's config, and of config and weights.
        modalities: Name -> kind.
        embed_dim, normalize: Of the rows: see `mmrep.model.MultimodalModel`.
        fingerprint: Of the data's index.
        splits: Which were asked for.
        shards: Their names, in the order of the rows.
        file_format: A key of `mmrep.search.row_files.FORMATS`.
    """

    model_config: str
    model: str
    modalities: dict[str, str]
    embed_dim: int
    normalize: str
    fingerprint: str
    splits: list[str]
    shards: list[str]
    file_format: str

    @property
    def digest(self) -> str:
        """What the records of finished shards carry, so that none is taken for that of another source."""
        return _digest(json.dumps(asdict(self), sort_keys=True))

    def check(self, other: Source, where: object) -> None:
        """Refuse to mix embeddings of different sources in one folder.

        Raises:
            ConfigError: With what differs.
        """
        words = {"model_config": "model", "fingerprint": "data", "file_format": "format", "shards": "splits"}
        names = asdict(self)
        differing = [words.get(name, name) for name in names if getattr(self, name) != getattr(other, name)]
        if differing:
            raise ConfigError(
                f"the folder holds embeddings of another {differing[0]}", where=where, fix="choose another --out"
            )


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """The embeddings of one shard.

    Attributes:
        name: The shard's.
        source: `Source.digest`.
        rows: Its samples without the broken ones.
        present: Modality -> how many of the rows have it.
        files: Path below the folder -> what it is.
        faults: The broken samples: key, modality, reason, detail.
    """

    name: str
    source: str
    rows: int
    present: dict[str, int]
    files: dict[str, FileRecord]
    faults: list[dict[str, str]]

    def sizes_fit(self, folder: Path) -> bool:
        """Whether its files are there in full length."""
        return all(_size(folder / name) == file.bytes for name, file in self.files.items())

    def digests_fit(self, folder: Path) -> bool:
        """Whether its files are there, bit by bit."""
        try:
            return self.sizes_fit(folder) and all(
                file_record(folder / name).sha256 == file.sha256 for name, file in self.files.items()
            )
        except FileNotFoundError:  # just replaced by another process
            return False


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        source: See there.
        data: Where the data was: a URL, or a path relative to the folder.
        shards: Records of all shards, in order; none until all are finished.
    """

    source: Source
    data: str
    shards: list[ShardRecord] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return [record.name for record in self.shards] == self.source.shards

    def save(self, folder: Path) -> None:
        """Write it beside and rename it. The same content gives the same bytes."""
        write_json(folder / NAME, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            DataError: If there is none, or it is broken or of another format.
        """
        path = folder / NAME
        if not path.is_file():
            raise DataError(
                f"no {NAME}", where=folder, fix="make one: mmrep embed --checkpoint RUN --data DIR --out DIR"
            )
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise DataError(f"format '{content.get('format')}'", where=path, fix=f"this version reads {FORMAT}")
        try:
            shards = [parse_record(record) for record in content["shards"]]
            return cls(_parse_source(content["source"]), str(content["data"]), shards)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"broken manifest ({error})", where=path, fix=AGAIN) from error


def parse_record(content: dict[str, Any]) -> ShardRecord:
    """A `ShardRecord` from plain data.

    Raises:
        KeyError, TypeError, AttributeError: If it is none.
    """
    files = {name: FileRecord(**file) for name, file in content["files"].items()}
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise TypeError("a file outside the folder")
    record = ShardRecord(**{**content, "files": files})
    counts = isinstance(record.present, dict) and all(
        isinstance(n, int) for n in (record.rows, *record.present.values())
    )
    sizes = all(isinstance(file.bytes, int) and isinstance(file.sha256, str) for file in files.values())
    if not counts or not sizes or not isinstance(record.name, str) or not isinstance(record.faults, list):
        raise TypeError("a record with values of other types")
    return record


def _parse_source(content: dict[str, Any]) -> Source:
    source = Source(**content)
    texts = (*source.splits, *source.shards, *source.modalities.items())
    named = isinstance(source.modalities, dict) and isinstance(source.splits, list) and isinstance(source.shards, list)
    if not named or not isinstance(source.embed_dim, int) or not all(isinstance(t, str | tuple) for t in texts):
        raise TypeError("a source with values of other types")
    return source


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: If the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"broken JSON ({error})", where=path, fix=AGAIN) from error
    if not isinstance(content, dict):
        raise DataError("the JSON is no object", where=path, fix=AGAIN)
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON beside and rename it; many processes may write the same file at once."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")


def file_record(path: Path) -> FileRecord:
    """Size and digest of a file as it is."""
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def config_digest(model: MultimodalModel) -> str:
    """sha256 of a model's config."""
    return _digest(json.dumps(model.config(), sort_keys=True))


def model_digest(model: MultimodalModel) -> str:
    """sha256 of a model's config and weights."""
    digest = hashlib.sha256(config_digest(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def relative_place(data: str, folder: Path) -> str:
    """Where data is, seen from a folder: both may be moved together."""
    return data if is_url(data) else os.path.relpath(Path(data).resolve(), folder.resolve())


def absolute_place(data: str, folder: Path) -> str:
    """The inverse of `relative_place`."""
    return data if is_url(data) else str((folder.resolve() / data).resolve())


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
