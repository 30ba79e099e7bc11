"""The table: an objective a line, a task and a share of missing modalities a column; mean and spread over seeds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.compare.results import Row
from benchmarks.compare.settings import BY_NAME, MISSING, SEEDS, TASKS


@dataclass(frozen=True)
class Figure:
    """Recall@1 over the seeds of one place of the table.

    Attributes:
        mean: Over the seeds.
        spread: Standard deviation over the seeds (of a sample: n - 1); None for one seed.
        seeds: How many.
    """

    mean: float
    spread: float | None
    seeds: int

    def __str__(self) -> str:
        if self.spread is None:
            return f"{100 * self.mean:.1f} (1 seed)"
        few = "" if self.seeds == len(SEEDS) else f" ({self.seeds} seeds)"
        return f"{100 * self.mean:.1f} ± {100 * self.spread:.1f}{few}"


def figure(rows: Sequence[Row], objective: str, task: str, missing: float) -> Figure | None:
    """The figure of a place; None where nothing was measured."""
    place = (objective, task, missing)
    found = [row["recall@1"] for row in rows if (row["objective"], row["task"], row["missing"]) == place]
    if not found:
        return None
    return Figure(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """Cells of the table's lines, the objective first; a dash where nothing was measured."""
    places = [(task, missing) for task in TASKS for missing in MISSING]
    return [[name, *(str(figure(rows, name, *place) or "-") for place in places)] for name in BY_NAME]


def headings() -> list[str]:
    """The first line."""
    return ["objective", *(f"{task}, {100 * missing:.0f} % missing" for task in TASKS for missing in MISSING)]


def markdown(rows: Sequence[Row]) -> list[str]:
    """The table as the README has it, a string a line."""
    whole = [headings(), ["---"] * len(headings()), *lines(rows)]
    return [f"| {' | '.join(cells)} |" for cells in whole]


def print_table(rows: Sequence[Row]) -> None:
    """Print it aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="recall@1 in %, mean ± standard deviation over seeds; test samples are complete")
    for heading in headings():
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for cells in lines(rows):
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
