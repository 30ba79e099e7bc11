"""How two things are compared: CPU time in one process, memory in fresh ones, and a table of ratios."""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, versions
from mmrep.progress import track

Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One comparison: ``ratio = ours / theirs``, smaller is better.

    Attributes:
        case: What was done.
        metric: What was measured, and its unit.
        ours, theirs: The figures.
        theirs_is: What ours is compared with.
        ratio, gate, aim: ``held`` is whether the ratio is within the gate; None where there is no gate.
    """

    case: str
    metric: str
    ours: float
    theirs: float
    theirs_is: str
    ratio: float
    gate: float | None
    aim: float | None
    held: bool | None

    @classmethod
    def of(
        cls,
        case: str,
        metric: str,
        ours: float,
        theirs: float,
        theirs_is: str,
        gate: float | None = None,
        aim: float | None = None,
    ) -> Row:
        """Compare two figures."""
        ratio = ours / theirs
        return cls(case, metric, ours, theirs, theirs_is, ratio, gate, aim, None if gate is None else ratio <= gate)


def interleaved(steps: Sequence[Step], rounds: int) -> list[float]:
    """Median CPU seconds of each step, run in turn: a slow spell of the machine meets all of them."""
    for step in steps:
        step()
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for found, step in zip(seconds, steps, strict=True):
            start = time.process_time()
            step()
            found.append(time.process_time() - start)
    return [statistics.median(found) for found in seconds]


def peak_growth(warm_up: Step, step: Step) -> int:
    """Bytes by which a step raises this process's peak of resident memory. Once in a process."""
    warm_up()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the comparisons, aligned."""
    table = Table("case", "metric", "ours", "theirs", "against", "ratio", "gate", "aim", "", title=title)
    for row in rows:
        verdict = {True: "held", False: "[bold red]missed[/]", None: ""}[row.held]
        limits = ["" if value is None else f"{value:.3f}" for value in (row.gate, row.aim)]
        figures = [f"{value:,.3f}" for value in (row.ours, row.theirs)]
        table.add_row(row.case, row.metric, *figures, row.theirs_is, f"{row.ratio:.3f}", *limits, verdict)
    Console(width=150).print(table)


def write(path: Path, rows: Sequence[Row], *packages: str, **more: object) -> None:
    """Write the comparisons as JSON, with machine and versions."""
    result = {"machine": machine(), "versions": versions(*packages), **more, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def replace_rows(earlier: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """The earlier rows, those that were measured again in their place, new ones behind."""
    again = {(row.case, row.metric, row.theirs_is): row for row in found}
    kept = [again.pop((row.case, row.metric, row.theirs_is), row) for row in earlier]
    return [*kept, *again.values()]


def comparison_parser(description: str | None, result: Path, *, rounds: int) -> argparse.ArgumentParser:
    """The command line of a benchmark whose rows go to ``result``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved runs of each step")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name holds it")
    parser.add_argument("--out", type=Path, help=f"where the JSON goes ({result}; a part of the cases is only shown)")
    parser.add_argument("--keep", action="store_true", help="write a part of the cases into an earlier result")
    return parser


def compare(
    title: str,
    measurements: Mapping[str, Callable[[], list[Row]]],
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    result: Path,
    packages: Sequence[str],
) -> None:
    """Measure what was chosen, print the table, write the JSON."""
    chosen = [
        run for name, run in measurements.items() if not options.only or any(text in name for text in options.only)
    ]
    if not chosen:
        parser.error(f"no case has {options.only} in its name; there are: {', '.join(measurements)}")
    found = [row for run in track(chosen, len(chosen), "comparisons") for row in run()]
    out: Path | None = options.out or (result if options.keep or not options.only else None)
    if options.keep and out is not None:
        found = replace_rows([Row(**row) for row in json.loads(out.read_text())["rows"]], found)
    show(title, found)
    if out is not None:
        write(out, found, *packages, rounds=options.rounds)
