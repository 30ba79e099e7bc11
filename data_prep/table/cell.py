"""What a table's cell can be: text, or bytes with the format that they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mmrep.data.decode import MAX_ARRAY_BYTES, NUMBERS
from mmrep.data.writer import npy_bytes
from mmrep.errors import DataError

MAX_CELL_BYTES = 512 * 1024 * 1024
"""More than any member that `mmrep.data.decode` accepts needs."""


@dataclass(frozen=True)
class Blob:
    """Bytes that stand in the table itself. The format is known by its first bytes, or by the name that came with them."""

    data: bytes
    suffix: str

    @cached_property
    def digest(self) -> bytes:
        return hashlib.blake2b(self.data, digest_size=16).digest()


Cell = str | Blob
"""Empty text is an empty cell."""


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        number: Its number over all files of the table.
        cells: By column.
        file: The name of its file, where there are several.
        place: Its number in the file: as a spreadsheet counts (the header is row 1), a line of JSONL from 1, a row of Parquet
            from 0.
    """

    number: int
    cells: Mapping[str, Cell]
    file: str
    place: int


class Reject(NamedTuple):
    """Why a row is dropped: its place, the cell at fault (empty where the row as a whole is), and its file among several."""

    row: int
    column: str
    value: str
    reason: str
    file: str = ""


def shown(cell: Cell) -> str:
    """A cell in a list of rejects."""
    return cell if isinstance(cell, str) else f"<{len(cell.data)} bytes>"


def cell_of(value: Any) -> Cell:
    """A plain value as a cell: of JSON, or of a Parquet column that holds no lists.

    Raises:
        DataError: If it is none that a modality can take.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, bytes):
        return blob(value)
    if isinstance(value, Mapping):
        return _picture_or_sound(value)
    if isinstance(value, list):
        return _numbers(value)
    return str(value)


def blob(data: bytes, name: str = "") -> Blob:
    """Bytes with their format.

    Raises:
        DataError: If they are too many.
    """
    if len(data) > MAX_CELL_BYTES:
        raise DataError(f"more than {MAX_CELL_BYTES} bytes")
    return Blob(data, known_format(data) or (name.rpartition(".")[2].lower() if "." in name else ""))


def array_blob(array: np.ndarray) -> Blob:
    """Numbers as the bytes of an .npy file.

    Raises:
        DataError: If they are no numbers, or too many.
    """
    if array.dtype.kind not in NUMBERS or array.nbytes > MAX_ARRAY_BYTES:
        raise DataError(f"a list of {array.dtype} and {array.nbytes} bytes is no array of numbers")
    return Blob(npy_bytes(array), "npy")


def _picture_or_sound(value: Mapping[str, Any]) -> Cell:
    """As Hugging Face's image and audio features are stored: the bytes, or else the path of a file."""
    data, path = value.get("bytes"), value.get("path")
    if isinstance(data, bytes):
        return blob(data, path if isinstance(path, str) else "")
    if data is None and (path is None or isinstance(path, str)):
        return path or ""
    raise DataError("neither text nor numbers nor {bytes, path}")


def _numbers(value: list[Any]) -> Blob:
    try:
        return array_blob(np.array(value))
    except ValueError as error:
        raise DataError("a list whose parts differ in length") from error


def known_format(data: bytes) -> str:
    """The extension of bytes by how they begin, of the formats that `mmrep.data.decode` takes; empty for others."""
    for signature, suffix in (
        *((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"fLaC", "flac"), (b"OggS", "ogg")),
        *((b"ID3", "mp3"), (b"\x93NUMPY", "npy")),
    ):
        if data.startswith(signature):
            return suffix
    if data.startswith(b"RIFF"):
        return {b"WEBP": "webp", b"WAVE": "wav"}.get(data[8:12], "")
    return "mp3" if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 else ""
