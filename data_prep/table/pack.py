"""One planned shard -> a tar and its record.

A shard depends on its rows alone, so nothing about the processes changes a byte. It is finished when both are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.building.finished_shards import FinishedShards
from data_prep.table.cell import Reject, Row, shown
from data_prep.table.cells import read_member
from data_prep.table.plan import ROWS, ShardPlan
from data_prep.table.sources import Source
from data_prep.table.spool import Spool
from mmrep.errors import DataError


@dataclass(frozen=True)
class Packing:
    """What all shards share.

    Attributes:
        folder: Where the tars go.
        work: Where the plan, the copies of the tables and the records are.
        tables: Names of the table's files.
        columns: Of the copies.
        sources: The modalities.
        root: Where relative paths begin.
        kept: Columns that the samples' JSON keeps.
        labels: Those of them whose values the report lists.
        image_size: Of shrunk pictures.
    """

    folder: Path
    work: Path
    tables: tuple[str, ...]
    columns: tuple[str, ...]
    sources: tuple[Source, ...]
    root: Path
    kept: tuple[str, ...]
    labels: tuple[str, ...]
    image_size: int | None

    def spool_path(self, file: int) -> Path:
        """Where the copy of one file is."""
        return self.work / f"table-{file:06d}.sqlite"

    @property
    def finished(self) -> FinishedShards:
        """The shards and their records."""
        return FinishedShards(self.folder, self.work)


@dataclass
class ShardReport:
    """What became of a planned shard; its record.

    Attributes:
        samples: Those that are in it; of none, where all rows are rejects, the tar is not written.
        present: Samples that have a modality.
        extensions: Of each modality.
        labels: Values of each label.
        rejects: Rows that are left out.
    """

    samples: int = 0
    present: dict[str, int] = field(default_factory=dict)
    extensions: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What the record says beside the samples' number and the tar's size and digest."""
        facts = asdict(self)
        del facts["samples"]
        for name in ("extensions", "labels"):
            facts[name] = {key: sorted(set(values)) for key, values in facts[name].items()}
        return facts


def load_report(packing: Packing, plan: ShardPlan) -> ShardReport | None:
    """The record of a shard that is finished, and whose tar is as it was written; else None."""
    record = packing.finished.load(plan.name)
    if record is None:
        return None
    try:
        known = {field.name: record[field.name] for field in fields(ShardReport)}
        return ShardReport(**known | {"rejects": [Reject(*found) for found in record["rejects"]]})
    except (KeyError, TypeError):
        return None


class Packer:
    """Writes shards, one after the other.

    Args:
        packing: What they share.
        plans: All of them.
    """

    def __init__(self, packing: Packing, plans: list[ShardPlan]) -> None:
        self.packing, self.plans = packing, {plan.name: plan for plan in plans}
        paths = [packing.spool_path(file) for file in range(len(packing.tables))]
        self.spool = Spool(paths, packing.tables, packing.columns)
        self.rows = np.load(packing.work / ROWS, mmap_mode="r", allow_pickle=False)

    def __call__(self, name: str) -> str:
        """Write one shard and its record; gives its name."""
        plan, report = self.plans[name], ShardReport()
        self.packing.finished.write(name, self._samples(plan, report), report.facts)
        return name

    def _samples(self, plan: ShardPlan, report: ShardReport) -> Iterator[dict[str, Any]]:
        for file, place, number in self.rows[plan.start : plan.stop].tolist():
            row = self.spool.row(file, place, number)
            members, rejects = self._members(row)
            report.rejects += rejects
            if rejects:
                continue
            kept = self._kept(row)
            _note(report, members, {column: kept[column] for column in self.packing.labels if column in kept})
            record = {"row": row.place, "split": plan.split} | ({"file": row.file} if row.file else {}) | kept
            yield {"__key__": f"{plan.split}-{row.number:08d}", "json": record} | dict(members.values())

    def _members(self, row: Row) -> tuple[dict[str, tuple[str, bytes]], list[Reject]]:
        """By modality (extension, content); and all that is wrong with the row, so that the user can mend it at once."""
        members, rejects = {}, []
        for source in self.packing.sources:
            try:
                if member := read_member(source, row, self.packing.root, self.packing.image_size):
                    members[source.name] = member
            except DataError as error:
                reason = re.sub(r" <[^>]* at 0x[^>]*>", "", error.what)  # an address differs from run to run
                rejects.append(_reject(row, str(error.where), reason))
        rejects += [
            _reject(row, c, "neither text nor number") for c in self.packing.kept if not isinstance(row.cells[c], str)
        ]
        if not members and not rejects:
            rejects.append(Reject(row.place, "", "", "no modality", row.file))
        return members, rejects

    def _kept(self, row: Row) -> dict[str, str]:
        cells = {column: row.cells[column] for column in self.packing.kept}
        return {
            column: cell.encode(errors="replace").decode()  # as the shard and the index can hold it
            for column, cell in cells.items()
            if isinstance(cell, str) and cell.strip()
        }


def _reject(row: Row, column: str, reason: str) -> Reject:
    return Reject(row.place, column, shown(row.cells[column]), reason, row.file)


def _note(report: ShardReport, members: dict[str, tuple[str, bytes]], labels: dict[str, str]) -> None:
    for name, (extension, _) in members.items():
        report.present[name] = report.present.get(name, 0) + 1
        _add(report.extensions.setdefault(name, []), extension)
    for column, value in labels.items():
        _add(report.labels.setdefault(column, []), value)


def _add(values: list[str], value: str) -> None:
    if value not in values:
        values.append(value)
