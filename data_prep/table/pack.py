"""Planned shards -> tars, in worker processes.

A shard depends on its rows alone, so the number of workers changes no byte.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.table.cells import read_member
from data_prep.table.progress import follow
from data_prep.table.rows import Reject, Row, ShardPlan
from data_prep.table.sources import Source
from mmrep.data.writer import write_shard
from mmrep.errors import DataError


@dataclass(frozen=True)
class Packing:
    """What all shards share: where they go, the modalities, the root of paths, the columns that the JSON keeps."""

    folder: Path
    sources: tuple[Source, ...]
    root: Path
    kept: tuple[str, ...]
    image_size: int | None


@dataclass
class ShardReport:
    """What became of a planned shard: samples, rows with each modality, its extensions, values by kept column."""

    plan: ShardPlan
    samples: int = 0
    present: Counter[str] = field(default_factory=Counter)
    extensions: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    kept: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    rejects: list[Reject] = field(default_factory=list)


def pack_shards(plans: Sequence[ShardPlan], packing: Packing, workers: int) -> list[ShardReport]:
    """Write all shards; one whose rows are all rejects is not written.

    Raises:
        DataError: If a worker process is killed.
    """
    work, sizes = partial(_pack_shard, packing), [len(plan.rows) for plan in plans]
    if workers == 1:
        return list(follow(map(work, plans), sizes))
    importlib.import_module("webdataset")  # seconds, once here instead of once in every fork
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            return list(follow(pool.map(work, plans), sizes))
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed", fix="if memory ran out, try --workers 1") from error


def _pack_shard(packing: Packing, plan: ShardPlan) -> ShardReport:
    report = ShardReport(plan)
    path = packing.folder / plan.name
    report.samples = write_shard(path, _samples(packing, plan, report))
    if not report.samples:
        path.unlink()
    return report


def _samples(packing: Packing, plan: ShardPlan, report: ShardReport) -> Iterator[dict[str, Any]]:
    for row in plan.rows:
        members, rejects = _members(packing, row)
        report.rejects += rejects
        if rejects:
            continue
        for name, (extension, _) in members.items():
            report.present[name] += 1
            report.extensions[name].add(extension)
        kept = {column: row.cells[column] for column in packing.kept if row.cells[column].strip()}
        for column, value in kept.items():
            report.kept[column].add(value)
        record = {"row": row.number, "split": plan.split} | kept
        yield {"__key__": f"{plan.split}-{row.number:08d}", "json": record} | dict(members.values())


def _members(packing: Packing, row: Row) -> tuple[dict[str, tuple[str, bytes]], list[Reject]]:
    """By modality (extension, content); and all that is wrong with the row, so that the user can mend it at once."""
    members, rejects = {}, []
    for source in packing.sources:
        try:
            if member := read_member(source, row, packing.root, packing.image_size):
                members[source.name] = member
        except DataError as error:
            column = str(error.where)
            reason = re.sub(r" <[^>]* at 0x[^>]*>", "", error.what)  # an address differs from run to run
            rejects.append(Reject(row.number, column, row.cells[column], reason))
    if not members and not rejects:
        rejects.append(Reject(row.number, "", "", "no modality"))
    return members, rejects
