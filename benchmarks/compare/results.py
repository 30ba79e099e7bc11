"""The result file: a row per cell, written as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compare.settings import BY_NAME, MISSING, SEEDS, TASKS, Cell, Settings, cells
from benchmarks.machine import machine, versions
from mmrep.errors import DataError

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows so far; none if there is no file.

    Raises:
        DataError: If the file is no result.
    """
    if not path.exists():
        return []
    try:
        rows: list[Row] = json.loads(path.read_text())["rows"]
        return rows
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            "not a result of make compare", where=path, fix="move it away, or give another --out"
        ) from error


def write(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Write the whole file beside and rename it: whoever is stopped leaves all finished cells."""
    done = {cell_of(row) for row in rows}
    result = {
        "machine": machine(),
        "versions": versions("torch", "mmrep"),
        "settings": {**asdict(settings), "objectives": describe()},
        "cells": {"planned": len(cells()), "done": sum(cell in done for cell in cells())},
        "rows": sorted(rows, key=_order),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def with_row(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with one more, which replaces an older one of its cell."""
    return [*(other for other in rows if cell_of(other) != cell_of(row)), row]


def to_do(wanted: Sequence[Cell], rows: Sequence[Row], digests: Mapping[Cell, str]) -> list[Cell]:
    """The cells without a row of their digest, in their order."""
    known = {cell_of(row): row["digest"] for row in rows}
    return [cell for cell in wanted if known.get(cell) != digests[cell]]


def cell_of(row: Mapping[str, Any]) -> Cell:
    """Whose row it is."""
    return Cell(row["objective"], row["task"], row["missing"], row["seed"])


def describe() -> dict[str, Any]:
    """The objectives as plain data."""
    return {
        name: {"loss": o.loss.__name__, "views": o.views, **{task: o.options_on(task) for task in TASKS}}
        for name, o in BY_NAME.items()
    }


def _order(row: Row) -> tuple[int, ...]:
    places = (TASKS, tuple(BY_NAME), MISSING, SEEDS)
    return tuple(
        known.index(row[key]) for known, key in zip(places, ("task", "objective", "missing", "seed"), strict=True)
    )
