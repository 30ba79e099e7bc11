"""The table's rows, the split of each, and the shards that they go to."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.table.sources import NAME
from mmrep.errors import DataError, did_you_mean

DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Row:
    """A row's cells by column, and its number in the file as a spreadsheet counts: the header is row 1."""

    number: int
    cells: dict[str, str]


class Reject(NamedTuple):
    """Why a row is dropped: its number, and the cell at fault (empty where the row as a whole is)."""

    row: int
    column: str
    value: str
    reason: str


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be: its file name, its split, and the rows that go in, in order."""

    name: str
    split: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SplitRule:
    """The split of a row: by a column, or by a hash of its group, or of its cells where it has no group.

    Args:
        column: Names the split.
        group: Rows with equal values go to the same split.
        val: Fraction of the groups in ``val``.
        test: Fraction of the groups in ``test``; the rest is ``train``.
        seed: Of the hash.
    """

    column: str | None
    group: str | None
    val: float
    test: float
    seed: int

    def split(self, row: Row) -> str:
        if self.column is not None:
            return row.cells[self.column].strip()
        group = row.cells[self.group] if self.group is not None else ""
        value = group if group.strip() else "\x1f".join(row.cells.values())
        fraction = digest(f"{self.seed} split {value}") / 2**64
        return "test" if fraction < self.test else "val" if fraction < self.test + self.val else "train"


def digest(text: str) -> int:
    """A stable 64-bit number (Python's own hash differs between processes)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def read_table(path: Path, columns: Sequence[str]) -> tuple[list[Row], list[Reject]]:
    """The named columns of all rows; a row with too few or too many cells is a reject, since its cells may be shifted.

    Raises:
        DataError: If there is no such file, it is no table, has no rows, or lacks a column.
    """
    if path.suffix.lower() not in DELIMITERS or not path.is_file():
        raise DataError("no such table", where=path, fix="give a file that ends in .csv or .tsv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter=DELIMITERS[path.suffix.lower()], strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"the table cannot be read ({error})", where=path, fix="save it as UTF-8, with closed quotes"
        ) from error
    if not any(lines[1:]):
        raise DataError("the table has no rows", where=path, fix="it needs a header and at least one row")
    return _pick(lines, _positions(lines[0], columns, path))


def _positions(header: list[str], columns: Sequence[str], path: Path) -> dict[str, int]:
    for column in columns:
        if column not in header:
            raise DataError(f"no column '{column}'", where=path, fix=did_you_mean(column, header))
        if header.count(column) > 1:
            raise DataError(f"two columns are named '{column}'", where=path, fix="rename one")
    return {column: header.index(column) for column in columns}


def _pick(lines: list[list[str]], positions: dict[str, int]) -> tuple[list[Row], list[Reject]]:
    rows, rejects = [], []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) == len(lines[0]):
            rows.append(Row(number, {column: line[at] for column, at in positions.items()}))
        elif line:  # a blank line is no row
            rejects.append(Reject(number, "", "", f"{len(line)} cells, the header has {len(lines[0])}"))
    return rows, rejects


def plan_shards(rows: Sequence[Row], rule: SplitRule, samples_per_shard: int) -> tuple[list[ShardPlan], list[Reject]]:
    """Rows in the order of a hash, so that every shard is a mixture, cut into shards per split."""
    splits: dict[str, list[Row]] = {}
    rejects = []
    for row in sorted(rows, key=lambda row: (digest(f"{rule.seed} order {row.number}"), row.number)):
        split = rule.split(row)
        if NAME.fullmatch(split):
            splits.setdefault(split, []).append(row)
        else:
            rejects.append(Reject(row.number, rule.column or "", split, "not a split's name" if split else "no split"))
    plans = []
    for split in sorted(splits):
        for number, start in enumerate(range(0, len(splits[split]), samples_per_shard)):
            chosen = tuple(splits[split][start : start + samples_per_shard])
            plans.append(ShardPlan(f"{split}-{number:06d}.tar", split, chosen))
    return plans, rejects


def straddling_groups(plans: Sequence[ShardPlan], group: str) -> int:
    """How many groups are in more than one split, as only a split column can have it."""
    splits: dict[str, set[str]] = {}
    for plan in plans:
        for row in plan.rows:
            splits.setdefault(row.cells[group], set()).add(plan.split)
    return sum(len(found) > 1 for value, found in splits.items() if value.strip())
