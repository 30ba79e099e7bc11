"""How the rows of a shard lie on disk: one Parquet file, or a folder of .npy files that can be mapped."""

from __future__ import annotations

import json
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmrep.data.writer import write_npy
from mmrep.errors import ConfigError, DataError
from mmrep.files import replacing
from mmrep.search.manifest import AGAIN, FileRecord, file_record

ROW_GROUP = 4096
"""Rows of a Parquet file that are read at a time."""


@dataclass(frozen=True)
class ShardRows:
    """The embeddings of one shard.

    Attributes:
        keys: Of the samples, ``[N]``.
        numbers: Places of the samples in the shard; broken ones are missing.
        rows: Modality -> fp32 ``[N, D]``.
        present: Modality -> bool ``[N]``.
        contents: Modality -> int64 ``[N]``, a digest of what was embedded: copies have the same.
    """

    keys: list[str]
    numbers: list[int]
    rows: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    contents: dict[str, np.ndarray]


Tile = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of rows that are there: their numbers in the file int64 ``[n]``, themselves ``[n, D]``, and contents int64 ``[n]``."""


class RowFormat(Protocol):
    """A way to store `ShardRows` below a path without a suffix."""

    def names(self, modalities: Iterable[str]) -> list[str]:
        """Of the columns or files that it writes, its own first."""

    def write(self, path: Path, shard: ShardRows) -> dict[Path, FileRecord]:
        """Write beside and rename; gives the files, and what they are: looked at before others can replace them."""

    def tiles(self, path: Path, modality: str, rows: int, width: int, tile: int) -> Iterator[Tile]:
        """The rows that are there, in order.

        Args:
            path: As it was written.
            modality: Whose rows.
            rows, width: What the file must have.
            tile: Rows of the file that are read at a time.

        Raises:
            DataError: If the file is broken.
        """

    def samples(self, path: Path) -> tuple[list[str], list[int]]:
        """Keys and numbers."""


class ParquetRows:
    """``NAME.parquet``: key, number, per modality M a fixed-size list of floats (null where it is absent) and M.content."""

    def names(self, modalities: Iterable[str]) -> list[str]:
        return ["key", "number", *(f"{name}{end}" for name in modalities for end in ("", ".content"))]

    def write(self, path: Path, shard: ShardRows) -> dict[Path, FileRecord]:
        pa, pq = _pyarrow()
        columns = {"key": pa.array(shard.keys, pa.string()), "number": pa.array(shard.numbers, pa.int64())}
        for name, rows in shard.rows.items():
            flat = pa.array(np.ascontiguousarray(rows, np.float32).ravel())
            absent = pa.array(~shard.present[name])
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, rows.shape[1], mask=absent)
            columns[f"{name}.content"] = pa.array(shard.contents[name], pa.int64())
        final = _suffixed(path, ".parquet")
        with replacing(final) as part:
            # Floats neither compress nor repeat; checksums find a flipped bit when the page is read.
            pq.write_table(
                pa.table(columns),
                part,
                row_group_size=ROW_GROUP,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
            return {final: file_record(part)}

    def tiles(self, path: Path, modality: str, rows: int, width: int, tile: int) -> Iterator[Tile]:
        final, first = _suffixed(path, ".parquet"), 0
        with _reading(final):
            for batch in _parquet(final).iter_batches(batch_size=tile, columns=[modality, f"{modality}.content"]):
                column, contents = batch.column(0), batch.column(1).to_numpy(zero_copy_only=False)
                there = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
                values = column.flatten().to_numpy(zero_copy_only=False)  # of those that are there
                yield first + there, values.reshape(len(there), width), contents[there]
                first += len(batch)
            if first != rows:
                raise ValueError(f"{first} rows in place of {rows}")

    def samples(self, path: Path) -> tuple[list[str], list[int]]:
        final = _suffixed(path, ".parquet")
        with _reading(final):
            table = _parquet(final).read(columns=["key", "number"])
            return table["key"].to_pylist(), table["number"].to_pylist()


class NpyRows:
    """``NAME/``: per modality M ``M.npy`` fp32 ``[N, D]``, ``M.present.npy``, ``M.content.npy``; keys and numbers as JSON."""

    def names(self, modalities: Iterable[str]) -> list[str]:
        ends = (".npy", ".present.npy", ".content.npy")
        return ["samples.json", *(f"{name}{end}" for name in modalities for end in ends)]

    def write(self, path: Path, shard: ShardRows) -> dict[Path, FileRecord]:
        with replacing(path) as part:
            part.mkdir()
            for name, rows in shard.rows.items():
                write_npy(part / f"{name}.npy", np.ascontiguousarray(rows, np.float32))
                write_npy(part / f"{name}.present.npy", shard.present[name])
                write_npy(part / f"{name}.content.npy", shard.contents[name])
            samples = {"keys": shard.keys, "numbers": shard.numbers}
            text = json.dumps(samples, ensure_ascii=False)
            (part / "samples.json").write_text(text, encoding="utf-8", errors="replace")
            return {path / file.name: file_record(file) for file in sorted(part.iterdir())}

    def tiles(self, path: Path, modality: str, rows: int, width: int, tile: int) -> Iterator[Tile]:
        with _reading(path / f"{modality}.npy"):
            values = np.load(path / f"{modality}.npy", mmap_mode="r", allow_pickle=False)
            present = np.load(path / f"{modality}.present.npy", allow_pickle=False)
            contents = np.load(path / f"{modality}.content.npy", allow_pickle=False)
            if values.shape != (rows, width) or values.dtype != np.float32 or not len(present) == len(contents) == rows:
                raise ValueError(f"{values.dtype} {values.shape} in place of float32 {(rows, width)}")
            for first in range(0, rows, tile):
                there = np.flatnonzero(present[first : first + tile])
                yield first + there, np.asarray(values[first : first + tile])[there], contents[first + there]

    def samples(self, path: Path) -> tuple[list[str], list[int]]:
        with _reading(path / "samples.json"):
            content = json.loads((path / "samples.json").read_text(encoding="utf-8"))
            return list(map(str, content["keys"])), list(map(int, content["numbers"]))


FORMATS: dict[str, RowFormat] = {"npy": NpyRows(), "parquet": ParquetRows()}


def check_names(file_format: str, modalities: Iterable[str]) -> None:
    """Refuse a modality whose column or file would take the place of another.

    Raises:
        ConfigError: With the name that both would have.
    """
    names = Counter(FORMATS[file_format].names(modalities))
    if twice := [name for name, times in names.items() if times > 1]:
        raise ConfigError(
            f"--format {file_format} cannot hold a modality whose rows are named '{twice[0]}', a name that is taken",
            fix="choose another --format, or leave it out by --modality",
        )


def check_installed(file_format: str) -> None:
    """Fail before the work, not after it.

    Raises:
        ConfigError: If a format needs what is not installed.
    """
    if file_format == "parquet":
        _pyarrow()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow", fix="pip install 'mmrep[search]', or --format npy") from error
    return pyarrow, pyarrow.parquet


def _parquet(path: Path) -> Any:
    _, pq = _pyarrow()
    return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)


def _suffixed(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a broken file raises, in one line. pyarrow's errors are ValueErrors, OSErrors and KeyErrors."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, SyntaxError, tokenize.TokenError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"broken embeddings ({reason[:120]})", where=path, fix=AGAIN) from error
