"""Rows of CSV, TSV and JSONL, one after the other."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from data_prep.building.build_folder import HopelessError
from data_prep.table.cell import Reject, Row, cell_of
from mmrep.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES_LOOKED_AT = 1000
"""Of a JSONL file, to know its fields."""


def delimited_columns(path: Path) -> list[str]:
    """The header of a CSV or TSV, its first line that is not blank; empty where the file is."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        _, header = next(_lines(path, file), (0, []))
        return header


def delimited_rows(path: Path, columns: Sequence[str]) -> Iterator[Row | Reject]:
    """A row with too few or too many cells is a reject, since its cells may be shifted; a blank line is none.

    Raises:
        HopelessError: If the file is no table.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _lines(path, file)
        _, header = next(lines, (0, []))
        if not header:
            return
        places = [header.index(column) for column in columns]
        for number, line in lines:
            if len(line) == len(header):
                cells = {column: line[place] for column, place in zip(columns, places, strict=True)}
                yield Row(number, cells, path.name, number)
            else:
                yield Reject(number, "", "", f"{len(line)} cells, the header has {len(header)}", path.name)


def _lines(path: Path, file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Those that are not blank, with their numbers as a spreadsheet counts, from 1."""
    try:
        lines = enumerate(csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True), start=1)
        yield from ((number, line) for number, line in lines if line)
    except (UnicodeDecodeError, csv.Error) as error:
        raise HopelessError(
            f"the table cannot be read ({error})", where=path, fix="save it as UTF-8, with closed quotes"
        ) from error


def jsonl_columns(path: Path) -> list[str]:
    """The fields of the first lines: a field may be missing in some."""
    names: dict[str, None] = {}
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line in islice(file, LINES_LOOKED_AT):
            with suppress(ValueError, RecursionError):  # told as a reject later
                content = json.loads(line)
                names |= dict.fromkeys(content if isinstance(content, dict) else ())
    return list(names)


def jsonl_rows(path: Path, columns: Sequence[str]) -> Iterator[Row | Reject]:
    """A line that is no object is a reject; a field that is missing or null is an empty cell.

    Raises:
        HopelessError: If the file is no text.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(path.name, number, line, columns)
    except UnicodeDecodeError as error:
        raise HopelessError(f"the table cannot be read ({error})", where=path, fix="save it as UTF-8") from error


def _json_row(name: str, number: int, line: str, columns: Sequence[str]) -> Row | Reject:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Reject(number, "", line[:200].rstrip(), f"no JSON ({error})", name)
    if not isinstance(content, dict):
        return Reject(number, "", line[:200].rstrip(), "no JSON object", name)
    cells = {}
    for column in columns:
        try:
            cells[column] = cell_of(content.get(column))
        except DataError as error:
            return Reject(number, column, str(content[column])[:200], error.what, name)
    return Row(number, cells, name, number)
