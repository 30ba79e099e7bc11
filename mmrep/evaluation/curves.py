"""The curves of a training run, from the CSV files of its folder."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from mmrep.errors import DataError

Curve = list[tuple[float, float]]


def read_curves(run: Path) -> dict[str, Curve]:
    """Column -> its finite values by step, of ``metrics.csv`` and of the parts before a resume; a later value of a step wins.

    Raises:
        DataError: If a file has no column of steps.
    """
    earlier = sorted(run.glob("metrics.before-resume-*.csv"), key=lambda path: (len(path.name), path.name))
    values: dict[str, dict[int, float]] = {}
    for path in [*earlier, run / "metrics.csv"]:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            lines = csv.DictReader(file)
            if "step" not in (lines.fieldnames or ()):
                raise DataError("no column 'step'", where=path, fix="give a run folder of mmrep")
            for line in lines:
                step = _number(line["step"])
                for name, text in line.items():
                    value = _number(text)
                    if name not in (None, "step", "epoch") and step is not None and value is not None:
                        values.setdefault(name, {})[int(step)] = value
    return {name: [(float(step), value) for step, value in sorted(found.items())] for name, found in values.items()}


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
