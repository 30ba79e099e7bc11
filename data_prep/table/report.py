"""What the user sees at the end: the rejects, and a table of what is in the shards."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.table.pack import ShardReport
from data_prep.table.rows import Reject
from data_prep.table.sources import Source

REASONS_SHOWN = 10


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """One line per cell at fault, in the order of the table."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Reject._fields)
        writer.writerows(sorted(rejects))


def reasons(rejects: Sequence[Reject]) -> list[tuple[str, int]]:
    """How many cells each reason has (a detail in brackets apart), the most frequent first."""
    return Counter(reject.reason.partition(" (")[0] for reject in sorted(rejects)).most_common()


def summary(reports: Sequence[ShardReport], sources: Sequence[Source], rejects: Sequence[Reject]) -> str:
    """Rows and presence per split, then rejects by reason."""
    names = [source.name for source in sources]
    counts: dict[str, Counter[str]] = {}
    for report in reports:
        if report.samples:
            counts.setdefault(report.plan.split, Counter()).update({"": report.samples} | report.present)
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
