"""Which files are the table, and their columns."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.table.cell import Reject, Row
from data_prep.table.parquet_files import check_types, parquet_columns, parquet_rows
from data_prep.table.text_files import delimited_columns, delimited_rows, jsonl_columns, jsonl_rows
from mmrep.errors import DataError, did_you_mean

Reader = tuple[Callable[[Path], list[str]], Callable[[Path, Sequence[str]], Iterator[Row | Reject]]]

READERS: dict[str, Reader] = {
    ".csv": (delimited_columns, delimited_rows),
    ".tsv": (delimited_columns, delimited_rows),
    ".jsonl": (jsonl_columns, jsonl_rows),
    ".parquet": (parquet_columns, parquet_rows),
}
"""By how a file's name ends: what gives its columns, and its rows."""


def find_tables(places: Sequence[Path]) -> list[Path]:
    """The files of a table, each once, in the order of the places and of their names.

    Args:
        places: Files, folders, or patterns with ``*``.

    Raises:
        DataError: If a place has none, one is of another format, or two have one name.
    """
    found: dict[Path, Path] = {}  # by where they really are: one may be given in two spellings
    for path in (path for place in places for path in _files(place)):
        found.setdefault(path.resolve(), path)
    for path in found.values():
        if path.suffix.lower() not in READERS:
            raise DataError("no such table", where=path, fix=f"give a file that ends in {', '.join(READERS)}")
    names = Counter(path.name for path in found.values())
    if twice := [name for name, count in names.items() if count > 1]:
        raise DataError(f"two files of the table are named '{twice[0]}'", where=places[0], fix="rename one")
    return list(found.values())


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        found = sorted(path for path in place.iterdir() if path.suffix.lower() in READERS and path.is_file())
    elif place.is_file():
        found = [place]
    else:
        found = sorted(Path(name) for name in glob.glob(str(place)) if Path(name).is_file())  # noqa: PTH207 - absolute too
    if not found:
        raise DataError(
            "no such table", where=place, fix=f"give a file that ends in {', '.join(READERS)}, or a folder of them"
        )
    return found


def check_columns(path: Path, uses: Mapping[str, set[str]]) -> None:
    """Refuse a file without the columns that are used, or with others of their name or of another type.

    Raises:
        DataError: With the first that is missing.
        ConfigError: If a Parquet column cannot be what it is asked for.
    """
    header = READERS[path.suffix.lower()][0](path)
    if not header:
        return  # no rows: told later, if none of the files has any
    for column in uses:
        if column not in header:
            raise DataError(f"no column '{column}'", where=path, fix=did_you_mean(column, header))
        if header.count(column) > 1:
            raise DataError(f"two columns are named '{column}'", where=path, fix="rename one")
    if path.suffix.lower() == ".parquet":
        check_types(path, uses)


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row | Reject]:
    """The rows of one file, as they are read.

    Raises:
        DataError: If it is damaged.
    """
    return READERS[path.suffix.lower()][1](path, columns)
