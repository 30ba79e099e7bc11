"""The rows of a table where any one can be read by its number: an SQLite file for each file of the table.

A shard holds rows from everywhere in the table, in the order of a hash. A CSV or Parquet file can only be read from its
beginning, so its cells are copied once. Equal bytes are kept once: five captions of one picture need it once.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.table.cell import Blob, Cell, Reject, Row
from data_prep.table.files import read_rows
from mmrep.errors import DataError
from mmrep.files import replacing

SCHEMA = """
CREATE TABLE blobs (digest BLOB PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE rows (place INTEGER PRIMARY KEY, cells TEXT NOT NULL);
CREATE TABLE rejects (place INTEGER, field TEXT, value TEXT, reason TEXT);
"""
ROWS_AT_ONCE = 16
"""Rows that are written at a time."""
MOST_OPEN = 64
"""SQLite files that are open at a time."""


def write_spool(table: Path, columns: Sequence[str], path: Path) -> None:
    """Copy the cells of some columns of one file; written beside and renamed.

    Raises:
        DataError: If the table cannot be read.
        OSError: If there is no room.
    """
    rows = read_rows(table, columns)
    with replacing(path, sync=True) as part:
        database = sqlite3.connect(part)
        try:
            # What is not finished is made anew: no journal, no waiting for the disk but once at the end.
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
            while some := list(islice(rows, ROWS_AT_ONCE)):
                _insert(database, some)
            database.commit()
        except sqlite3.OperationalError as error:
            raise OSError(f"{error}, in {path.parent}") from error
        finally:
            database.close()


def _insert(database: sqlite3.Connection, some: Sequence[Row | Reject]) -> None:
    rows = [item for item in some if isinstance(item, Row)]
    rejects = [item for item in some if isinstance(item, Reject)]
    blobs = ((cell.digest, cell.data) for row in rows for cell in row.cells.values() if isinstance(cell, Blob))
    database.executemany("INSERT OR IGNORE INTO blobs VALUES (?, ?)", blobs)
    database.executemany("INSERT INTO rows VALUES (?, ?)", ((row.place, _packed(row.cells.values())) for row in rows))
    database.executemany("INSERT INTO rejects VALUES (?, ?, ?, ?)", (reject[:4] for reject in rejects))


def _packed(cells: Iterable[Cell]) -> str:
    """Texts as they are; bytes as their digest and format. Lone surrogates, which UTF-8 has not, as JSON's escapes."""
    return json.dumps([cell if isinstance(cell, str) else [cell.digest.hex(), cell.suffix] for cell in cells])


class Spool:
    """The rows of all files.

    Args:
        paths: A spool for each file of the table.
        names: Of the files.
        columns: Of the cells, as they were written.
    """

    def __init__(self, paths: Sequence[Path], names: Sequence[str], columns: Sequence[str]) -> None:
        self.paths, self.names, self.columns = list(paths), list(names), list(columns)
        self._open: dict[int, sqlite3.Connection] = {}

    def rows(self) -> Iterator[tuple[int, Row]]:
        """All rows with the number of their file, in order; a digest stands in place of bytes."""
        first = 0
        for file, name in enumerate(self.names):
            place = -1
            for place, text in self._query(file, "SELECT place, cells FROM rows ORDER BY place"):
                cells = (
                    cell if isinstance(cell, str) else Blob(bytes.fromhex(cell[0]), cell[1])
                    for cell in json.loads(text)
                )
                yield file, Row(first + place, dict(zip(self.columns, cells, strict=True)), self._label(name), place)
            first += place + 1

    def rejects(self) -> list[Reject]:
        """The rows that could not be read."""
        return [
            Reject(place, column, value, reason, self._label(name))
            for file, name in enumerate(self.names)
            for place, column, value, reason in self._query(
                file, "SELECT place, field, value, reason FROM rejects ORDER BY place"
            )
        ]

    def row(self, file: int, place: int, number: int) -> Row:
        """One row, with its bytes.

        Args:
            file: Which.
            place: The row's number in it.
            number: Its number over all files.
        """
        ((text,),) = self._query(file, "SELECT cells FROM rows WHERE place = ?", (place,))
        cells = (cell if isinstance(cell, str) else self._blob(file, *cell) for cell in json.loads(text))
        return Row(number, dict(zip(self.columns, cells, strict=True)), self._label(self.names[file]), place)

    def _blob(self, file: int, digest: str, suffix: str) -> Blob:
        ((data,),) = self._query(file, "SELECT data FROM blobs WHERE digest = ?", (bytes.fromhex(digest),))
        return Blob(data, suffix)

    def _label(self, name: str) -> str:
        return name if len(self.names) > 1 else ""

    def _query(self, file: int, query: str, values: Sequence[object] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._database(file).execute(query, values)
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and self.paths[file].exists():
                raise OSError(f"{error}, of {self.paths[file]}") from error
            folder = self.paths[file].parents[1]  # of all that was built: the copy is in the work folder below it
            raise DataError(
                f"a broken copy of the table ({error})",
                where=self.paths[file],
                fix=f"remove {folder}, and run it again",
            ) from error

    def _database(self, file: int) -> sqlite3.Connection:
        if file not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            # Nobody writes it: without locks it can be read on any file system, by any number of processes.
            place = f"{self.paths[file].resolve().as_uri()}?mode=ro&immutable=1"
            self._open[file] = sqlite3.connect(place, uri=True)
        return self._open[file]
