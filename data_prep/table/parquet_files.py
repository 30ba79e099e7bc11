"""Rows of Parquet, a few at a time: bytes, {bytes, path}, lists of numbers, texts and numbers.

Nothing is unpickled: an extension type counts as what it is stored as. Memory: of each column that is read two or three times a
page and its dictionary, and ``ROWS_AT_ONCE`` cells, however large the file and its row groups. A page is as large as its
header says, which pyarrow believes: at most 2 GiB. Writers choose 1 MiB, pyarrow at least 1,024 cells. A page that says "the
same cell ten million times" is not spread out at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.building.build_folder import HopelessError
from data_prep.building.read_file import is_passing
from data_prep.table.cell import MAX_CELL_BYTES, Cell, Reject, Row, array_blob, cell_of
from data_prep.table.sources import VALUES
from mmrep.errors import ConfigError, DataError

ROWS_AT_ONCE = 16
BUFFER_BYTES = 1 << 20
"""Of a column chunk that are read at a time."""
NAMES = "names"
"""The use of a column of splits, groups or labels."""
TAKEN_BY: dict[str, frozenset[str]] = {
    "text": frozenset({"image", "audio", "array", "text", VALUES, NAMES}),
    "number": frozenset({"text", VALUES, NAMES}),
    "time": frozenset({"text", NAMES}),
    "bytes": frozenset({"image", "audio", "array", "text"}),
    "{bytes, path}": frozenset({"image", "audio"}),
    "list of numbers": frozenset({"array"}),
}
"""What a column of a type can be used as."""


def parquet_columns(path: Path) -> list[str]:
    """The names of a file's columns.

    Raises:
        DataError: If it is no Parquet.
    """
    with reading(path):
        names: list[str] = open_parquet(path).schema_arrow.names
        return names


def check_types(path: Path, uses: Mapping[str, set[str]]) -> None:
    """Refuse a column that cannot be what it is asked for.

    Args:
        path: The file.
        uses: Column -> kinds of modalities, or `NAMES`.

    Raises:
        ConfigError: With the first such column.
    """
    with reading(path):
        schema = open_parquet(path).schema_arrow
    for column, kinds in uses.items():
        stored = schema.field(column).type
        kind = _kind(stored)
        if kind is None or not kinds <= TAKEN_BY[kind]:
            wanted = ", ".join(sorted(kinds - TAKEN_BY.get(kind or "", frozenset())))
            raise ConfigError(
                f"column '{column}' holds {str(stored)[:80]}, which is no {wanted}",
                where=path,
                fix="see docs/corpus_scale.md for what each option takes",
            )


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row | Reject]:
    """The rows in order.

    Raises:
        DataError: If the file is damaged.
    """
    number = 0
    for batch in batches(path, columns):
        converted = [_cells(batch.column(place)) for place in range(len(columns))]
        for place in range(batch.num_rows):
            cells = {column: converted[at][place] for at, column in enumerate(columns)}
            yield _row(path.name, number, cells)
            number += 1


def _row(name: str, number: int, cells: dict[str, Cell | DataError]) -> Row | Reject:
    good: dict[str, Cell] = {}
    for column, cell in cells.items():
        if isinstance(cell, DataError):
            return Reject(number, column, "", cell.what, name)
        good[column] = cell
    return Row(number, good, name, number)


def _check_sizes(file: Any, columns: Sequence[str], groups: Sequence[int]) -> None:
    """Refuse row groups whose cells are too large on average, before one is unpacked.

    Raises:
        ValueError: With the first of them.
    """
    for number in groups:
        group = file.metadata.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            size = chunk.total_uncompressed_size
            if chunk.path_in_schema.partition(".")[0] in columns and size > MAX_CELL_BYTES * max(1, group.num_rows):
                raise ValueError(f"{size} bytes in {group.num_rows} rows of column '{chunk.path_in_schema}'")


def batches(path: Path, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[Any]:
    """The rows of some columns, ``ROWS_AT_ONCE`` at a time, as they are read.

    Args:
        path: The file.
        columns: In the order of the batches' columns.
        groups: Row groups; by default all.

    Raises:
        DataError: If the file is damaged, or cells are too large on average.
    """
    with reading(path):
        file = open_parquet(path)
        chosen = range(file.metadata.num_row_groups) if groups is None else groups
        _check_sizes(file, columns, chosen)
        found = file.iter_batches(ROWS_AT_ONCE, row_groups=chosen, columns=list(columns), use_threads=False)
    while True:
        with reading(path):
            batch = next(found, None)
            if batch is None:
                return
            batch = batch.select(list(columns))
        yield batch


def _cells(column: Any) -> list[Cell | DataError]:
    import pyarrow as pa

    shape = getattr(column.type, "shape", None)  # of a fixed-shape tensor
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if _kind(column.type) == "list of numbers":
        return [_tried(_array, value, shape) for value in column]
    return [_tried(_plain, value) for value in column]


def _tried(convert: Any, *arguments: Any) -> Cell | DataError:
    try:
        cell: Cell = convert(*arguments)
        return cell
    except DataError as error:
        return error
    except (ValueError, OverflowError) as error:  # a time beyond Python's
        return DataError(f"cannot be read ({str(error).splitlines()[0]})")


def _plain(value: Any) -> Cell:
    return cell_of(value.as_py())


def _array(value: Any, shape: Sequence[int] | None) -> Cell:
    """Lists of one length each become an array ``[n, ...]``."""
    from pyarrow import compute

    if not value.is_valid:
        return ""
    numbers, sizes = value.values, [len(value.values)]
    while _is_list(numbers.type):
        lengths = compute.unique(
            compute.list_value_length(numbers)
        ).to_pylist()  # none of an empty list, None of a null
        if len(lengths) > 1 or None in lengths:
            raise DataError("a list whose parts differ in length")
        sizes.append(lengths[0] if lengths else 0)
        numbers = numbers.flatten()
    if numbers.null_count:
        raise DataError("a list with an empty place")
    array: np.ndarray = numbers.to_numpy(zero_copy_only=False).reshape(shape or sizes)
    return array_blob(array)


def _kind(stored: Any) -> str | None:
    """A key of `TAKEN_BY`."""
    import pyarrow as pa
    from pyarrow import types

    if isinstance(stored, pa.BaseExtensionType):
        return _kind(stored.storage_type)
    if types.is_dictionary(stored):
        return _kind(stored.value_type)
    if (
        types.is_string(stored)
        or types.is_large_string(stored)
        or types.is_string_view(stored)
        or types.is_null(stored)
    ):
        return "text"
    if types.is_boolean(stored) or types.is_integer(stored) or types.is_floating(stored) or types.is_decimal(stored):
        return "number"
    if types.is_temporal(stored):
        return "time"
    if _is_bytes(stored):
        return "bytes"
    if types.is_struct(stored) and {"bytes", "path"} <= {field.name for field in stored}:
        return "{bytes, path}"
    if _is_list(stored):
        inner = stored.value_type
        return "list of numbers" if (_is_list(inner) and _kind(inner)) or _is_number(inner) else None
    return None


def _is_bytes(stored: Any) -> bool:
    from pyarrow import types

    return bool(
        types.is_binary(stored)
        or types.is_large_binary(stored)
        or types.is_fixed_size_binary(stored)
        or types.is_binary_view(stored)
    )


def _is_list(stored: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(stored) or types.is_large_list(stored) or types.is_fixed_size_list(stored))


def _is_number(stored: Any) -> bool:
    from pyarrow import types

    return bool(types.is_boolean(stored) or types.is_integer(stored) or types.is_floating(stored))


def open_parquet(path: Path) -> Any:
    """A file, of which the footer is read; call it and what reads from it within `reading`."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow", fix="pip install 'mmrep[search]'") from error
    # A buffer, and none filled ahead: else pyarrow holds a whole row group, which may be the whole file.
    return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What a broken file raises, in one line. pyarrow's errors are ValueErrors, OSErrors, KeyErrors and MemoryErrors."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, MemoryError) as error:
        if isinstance(error, OSError) and is_passing(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HopelessError(
            f"the table cannot be read ({reason[:160]})", where=path, fix="write it anew, as Parquet"
        ) from error
