"""What the user sees at the end: the rejects, and a table of what is in the shards."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.table.cell import Reject
from data_prep.table.pack import ShardReport
from data_prep.table.plan import ShardPlan
from data_prep.table.sources import Source

REASONS_SHOWN = 10


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """One line per cell at fault, in the order of the table; with the file's name where there are several."""
    width = len(Reject._fields) if any(reject.file for reject in rejects) else len(Reject._fields) - 1
    with path.open("w", encoding="utf-8", newline="", errors="replace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Reject._fields[:width])
        writer.writerows(reject[:width] for reject in sorted(rejects, key=in_order))


def in_order(reject: Reject) -> tuple[str, Reject]:
    """By file, row and column."""
    return reject.file, reject


def reasons(rejects: Sequence[Reject]) -> list[tuple[str, int]]:
    """How many cells each reason has (a detail in brackets apart), the most frequent first."""
    return Counter(reject.reason.partition(" (")[0] for reject in sorted(rejects, key=in_order)).most_common()


def summary(
    reports: Sequence[tuple[ShardPlan, ShardReport]], sources: Sequence[Source], rejects: Sequence[Reject]
) -> str:
    """Rows and presence per split, then rejects by reason."""
    names = [source.name for source in sources]
    counts: dict[str, Counter[str]] = {}
    for plan, report in reports:
        if report.samples:
            counts.setdefault(plan.split, Counter()).update({"": report.samples} | report.present)
    table = [["split", "rows", *names]]
    table += [[split, *(str(count[name]) for name in ["", *names])] for split, count in counts.items()]
    lines = _aligned(table)
    if rejects:
        shown = [["rejects", "cells"], *([reason, str(count)] for reason, count in reasons(rejects)[:REASONS_SHOWN])]
        lines += ["", *_aligned(shown), "listed in rejects.csv"]
    return "\n".join(lines)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
