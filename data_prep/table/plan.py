"""The split of each row, and the shards that they go to: computed once, kept as two files, read by all workers."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_prep.table.cell import Reject, Row
from data_prep.table.sources import NAME
from data_prep.table.spool import Spool
from mmrep.data.writer import write_npy
from mmrep.files import replacing

PLAN, ROWS = "plan.json", "rows.npy"


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be: its file name, its split, and which part of the rows in the order of the shards it is."""

    name: str
    split: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


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
            return _text(row, self.column).strip()
        group = _text(row, self.group) if self.group is not None else ""
        value = group if group.strip() else "\x1f".join(_text(row, column) for column in row.cells)
        fraction = digest(f"{self.seed} split {value}") / 2**64
        return "test" if fraction < self.test else "val" if fraction < self.test + self.val else "train"


@dataclass(frozen=True)
class Plan:
    """All shards.

    Attributes:
        shards: In order.
        total: Rows of the table.
        rejects: Rows that cannot be read, or have no split.
        straddling: Groups that are in more than one split, as only a split column can have it.
    """

    shards: list[ShardPlan]
    total: int
    rejects: list[Reject]
    straddling: int

    def save(self, folder: Path, rows: np.ndarray) -> None:
        """Write it; the plan itself last.

        Args:
            folder: Where.
            rows: File, place and number of each row in the order of the shards, int64 ``[N, 3]``.
        """
        with replacing(folder / ROWS, sync=True) as part:
            write_npy(part, rows)
        with replacing(folder / PLAN, sync=True) as part:
            part.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan of a run that was interrupted; None where there is none, or it is damaged."""
        try:
            content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            shards = [ShardPlan(**shard) for shard in content["shards"]]
            rejects = [Reject(*reject) for reject in content["rejects"]]
            np.load(folder / ROWS, mmap_mode="r", allow_pickle=False)
            return cls(shards, content["total"], rejects, content["straddling"])
        except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError):
            return None


def digest(text: str) -> int:
    """A stable 64-bit number (Python's own hash differs between processes)."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def make_plan(spool: Spool, rule: SplitRule, samples_per_shard: int, folder: Path) -> Plan:
    """Rows in the order of a hash, so that every shard is a mixture, cut into shards per split; the plan is saved.

    Takes about 100 bytes of memory a row, and the groups where a column names the split.
    """
    rejects = spool.rejects()
    total, names, groups = len(rejects), dict[str, int](), dict[str, set[int]]()
    rows, orders, splits = array("q"), array("Q"), array("q")
    for file, row in spool.rows():
        total += 1
        split = rule.split(row)
        if not NAME.fullmatch(split):
            reason = "not a split's name" if split else "no split"
            rejects.append(Reject(row.place, rule.column or "", split[:200], reason, row.file))
            continue
        code = names.setdefault(split, len(names))
        if rule.column is not None and rule.group is not None:
            groups.setdefault(_text(row, rule.group), set()).add(code)
        rows.extend((file, row.place, row.number))
        orders.append(digest(f"{rule.seed} order {row.number}"))
        splits.append(code)
    order = np.lexsort(
        (_numbers(rows)[2::3], np.frombuffer(orders, np.uint64) if orders else [], _ranks(names, splits))
    )
    sizes = np.bincount(_ranks(names, splits), minlength=len(names)).tolist()
    straddling = sum(len(found) > 1 for value, found in groups.items() if value.strip())
    plan = Plan(_cut(sorted(names), sizes, samples_per_shard), total, rejects, straddling)
    plan.save(folder, _numbers(rows).reshape(-1, 3)[order])
    return plan


def _cut(names: Sequence[str], sizes: Sequence[int], samples_per_shard: int) -> list[ShardPlan]:
    """The shards of splits that lie one after the other."""
    shards, first = [], 0
    for name, size in zip(names, sizes, strict=True):
        for number, start in enumerate(range(0, size, samples_per_shard)):
            stop = min(start + samples_per_shard, size)
            shards.append(ShardPlan(f"{name}-{number:06d}.tar", name, first + start, first + stop))
        first += size
    return shards


def _ranks(names: dict[str, int], splits: array[int]) -> np.ndarray:
    """The place of each row's split in alphabetical order, int64 ``[N]``."""
    places = np.empty(len(names), np.int64)
    places[[names[name] for name in sorted(names)]] = np.arange(len(names))
    ranks: np.ndarray = places[_numbers(splits)]
    return ranks


def _numbers(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)


def _text(row: Row, column: str) -> str:
    """A cell as text; of bytes, their digest."""
    cell = row.cells[column]
    return cell if isinstance(cell, str) else f"\0{cell.data.hex()}"
