"""A cell -> the bytes of a member, decoded once to prove that training can read them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from data_prep.building.read_file import read_file
from data_prep.released_files import check_member
from data_prep.table.cell import MAX_CELL_BYTES, Blob, Row
from data_prep.table.sources import VALUES, Source
from mmrep.data.writer import npy_bytes
from mmrep.errors import DataError


def read_member(source: Source, row: Row, root: Path, image_size: int | None) -> tuple[str, bytes] | None:
    """A row's member of one modality.

    Args:
        source: The modality.
        row: The row.
        root: Where relative paths begin.
        image_size: A picture is shrunk until its shorter side has at most so many pixels.

    Returns:
        ``(extension, content)``, or None where all its cells are empty: the row lacks the modality.

    Raises:
        DataError: If a cell cannot be used; ``where`` is its column.
        OSError: If the file system fails.
    """
    if all(_is_empty(row, column) for column in source.columns):
        return None
    column = source.columns[0]
    if source.kind == VALUES:
        suffix, data = "npy", npy_bytes(_vector(source, row))
    else:
        suffix, data = _stored(source.kind, row, column, root)
    suffix, data = check_member(source.stored_kind, suffix, data, column, image_size)
    return source.prefix + suffix, data


def _is_empty(row: Row, column: str) -> bool:
    cell = row.cells[column]
    return isinstance(cell, str) and not cell.strip()


def _stored(kind: str, row: Row, column: str, root: Path) -> tuple[str, bytes]:
    """Format and bytes: of the cell itself, or of the file that it names."""
    cell = row.cells[column]
    if kind == "text":
        return "txt", cell.data if isinstance(cell, Blob) else cell.encode(errors="replace")
    if isinstance(cell, Blob):
        return cell.suffix, cell.data
    return _read_file(cell.strip(), column, root)


def _vector(source: Source, row: Row) -> np.ndarray:
    """float32 ``[number of columns]``; NaN where a cell is empty."""
    numbers = np.full(len(source.columns), np.nan, dtype=np.float32)
    for position, column in enumerate(source.columns):
        cell = row.cells[column]
        try:
            if isinstance(cell, Blob):
                raise ValueError("bytes")
            if not cell.strip():
                continue
            number = float(cell)
        except ValueError as error:
            raise DataError("not a number", where=column) from error
        if abs(number) > float(np.finfo(np.float32).max):
            raise DataError("not a finite float32", where=column)
        numbers[position] = number
    return numbers


def _read_file(cell: str, column: str, root: Path) -> tuple[str, bytes]:
    path = _local_path(cell, column, root)
    return path.suffix.removeprefix(".").lower(), read_file(path, MAX_CELL_BYTES, column)


def _local_path(cell: str, column: str, root: Path) -> Path:
    """An absolute path as it is; a relative one must stay below the root."""
    if "://" in cell or "pipe:" in cell:
        raise DataError("not a local file", where=column)
    path = Path(os.path.normpath(root / cell))
    if not Path(cell).is_absolute() and not path.is_relative_to(os.path.normpath(root)):
        raise DataError("outside the root folder", where=column)
    return path
