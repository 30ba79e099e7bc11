"""What the scaling model is shown as: tables for a terminal and for ``scaling.md``, JSON and plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.scaling_model import Shape
from benchmarks.scaling_rows import BATCHES, CASES, GPUS, Numbers, Row, calibration, reader_seconds, row

RESULT, PLOT = Path("benchmarks/results/scaling.json"), Path("benchmarks/results/scaling.png")
TABLE_GPUS, TABLE_BATCHES = [1, 8, 64, 256, 1024], [1024, 8192, 32768, 131072]

Column = tuple[str, Callable[[Row], str]]
COLUMNS: tuple[Column, ...] = (
    ("batch", lambda r: f"{r.shape.batch:,}"),
    ("GPUs", lambda r: f"{r.shape.gpus:,}"),
    ("encoders ms", lambda r: _figure(1e3 * r.time.encoders)),
    ("loss ms", lambda r: _figure(1e3 * r.time.loss)),
    ("loss sends MB", lambda r: _figure(r.cost.sent / 1e6)),
    ("its ms", lambda r: _figure(1e3 * r.time.loss_traffic)),
    ("gradients ms", lambda r: _figure(1e3 * r.time.gradients)),
    ("waiting ms", lambda r: _figure(1e3 * r.time.waiting)),
    ("step ms", lambda r: _figure(1e3 * r.time.total)),
    ("samples/s", lambda r: f"{r.samples_per_second:,.0f}"),
    ("loss share", lambda r: f"{r.time.loss_share:.1%}"),
    ("efficiency", lambda r: f"{r.time.encoders / r.time.total:.1%}"),
    ("loss memory MiB", lambda r: f"{r.cost.memory / 2**20:,.0f}"),
    ("reads MB/s a node", lambda r: f"{r.reader_rate / 1e6:,.0f}"),
    ("cores a node", lambda r: f"{r.reader_cores:,.1f}"),
)


def _figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def title(loss: str, shape: Shape) -> str:
    """Of a loss's table."""
    views = f", V = {shape.views}" if shape.views > 1 else ""
    return f"{loss}, M = {shape.modalities}{views}, D = {shape.width}"


def cells(rows: Iterable[Row]) -> list[list[str]]:
    """The table's text, line by line."""
    return [[text(r) for _, text in COLUMNS] for r in rows]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)])


def first_above(shares: Iterable[tuple[int, float]], limit: float) -> str:
    """The first size whose share is above a limit."""
    return next((f"{size:,}" for size, share in shares if share > limit), "never")


def limits(numbers: Numbers) -> list[list[str]]:
    """Where each loss takes a tenth, and a half, of the step."""
    found = []
    for loss, m in CASES:
        by_gpus = [(gpus, row(loss, gpus, 32768, numbers, m)) for gpus in GPUS]
        by_batch = [(batch, row(loss, 64, batch, numbers, m)) for batch in BATCHES]
        traffic = [
            (gpus, (r.time.loss_traffic + r.time.gradients) / (r.time.total - r.time.waiting)) for gpus, r in by_gpus
        ]
        last = by_batch[-1][1]
        found.append(
            [title(loss, last.shape).rsplit(", D", 1)[0]]
            + [first_above(((size, r.time.loss_share) for size, r in by_batch), limit) for limit in (0.1, 0.5)]
            + [first_above(((size, r.time.loss_share) for size, r in by_gpus), limit) for limit in (0.1, 0.5)]
            + [first_above(traffic, limit) for limit in (0.1, 0.5)]
            + [f"{last.cost.memory / 2**30:,.1f}"]
        )
    return found


LIMITS_HEAD = (
    "loss",
    "10 %: batch, on 64 GPUs",
    "50 %",
    "10 %: GPUs, batch 32,768",
    "50 %",
    "10 % in traffic: GPUs, batch 32,768",
    "50 %",
    "loss memory GiB, batch 131,072 on 64",
)


def page_tables() -> str:
    """All tables of ``scaling.md``."""
    numbers = Numbers()
    errors = [
        [gpu, str(nodes), f"{published:.2f}", f"{ours:.2f}", f"{100 * (ours - published) / nodes:+.1f}"]
        for gpu, nodes, published, ours in calibration()
    ]
    head = ["NeMo, CLIP g/14", "nodes", "published speed-up", "model", "points of efficiency"]
    parts = ["### Against published scaling", markdown(head, errors)]
    parts += ["### Where each loss stops scaling", markdown(LIMITS_HEAD, limits(numbers))]
    for loss, m in CASES:
        rows = [row(loss, w, n, numbers, m) for n in TABLE_BATCHES for w in TABLE_GPUS if n // w <= 32768]
        parts += [f"### {title(loss, rows[0].shape)}", markdown([name for name, _ in COLUMNS], cells(rows))]
    return "\n\n".join(parts)


def show(rows: Sequence[Row]) -> None:
    """Print one loss's table, aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(rows[0].loss, rows[0].shape), title_justify="left")
    for name, _ in COLUMNS:
        table.add_column(name, justify="right")
    for line in cells(rows):
        table.add_row(*line)
    Console(width=max(100, Console().width if Console().is_terminal else 190)).print(table)


def write_results() -> None:
    """The default numbers' JSON and plot."""
    numbers = Numbers()
    rows = [row(loss, w, n, numbers, m) for loss, m in CASES for n in BATCHES for w in GPUS if n % w == 0]
    result: dict[str, Any] = {
        "inputs": {**asdict(numbers), "reader_seconds_a_sample": reader_seconds()},
        "calibration": [
            dict(zip(("gpu", "nodes", "published", "model"), found, strict=True)) for found in calibration()
        ],
        "rows": [
            {
                "loss": r.loss,
                "modalities": r.shape.modalities,
                "views": r.shape.views,
                "gpus": r.shape.gpus,
                "batch": r.shape.batch,
                **{f"{name}_s": value for name, value in asdict(r.time).items()},
                **{f"loss_{name}": value for name, value in asdict(r.cost).items()},
            }
            for r in rows
        ],
    }
    RESULT.write_text(json.dumps(result) + "\n")
    plot(numbers)


def plot(numbers: Numbers) -> None:
    """The loss's share by batch and by GPUs, and what is left of the encoders' speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    by_batch, by_gpus, efficiency = figure.subplots(1, 3)
    for loss, m in CASES:
        label = f"{loss}, M = {numbers.of(loss, m)[0].modalities}"
        shares = [100 * row(loss, 64, batch, numbers, m).time.loss_share for batch in BATCHES]
        by_batch.plot(BATCHES, shares, marker="o", markersize=3, linewidth=1.2)
        over = [row(loss, gpus, 32768, numbers, m) for gpus in GPUS]
        by_gpus.plot(GPUS, [100 * r.time.loss_share for r in over], marker="o", markersize=3, linewidth=1.2)
        kept = [100 * r.time.encoders / r.time.total for r in over]
        efficiency.plot(GPUS, kept, marker="o", markersize=3, linewidth=1.2, label=label)
    names = (
        "loss, % of the step: 64 GPUs",
        "loss, % of the step: batch 32,768",
        "encoders, % of the step: batch 32,768",
    )
    for axes, name in zip((by_batch, by_gpus, efficiency), names, strict=True):
        axes.set_xscale("log", base=2)
        if axes is efficiency:
            axes.set_ylim(0, 101)
        else:
            axes.set_yscale("log")
            axes.set_ylim(0.05, 130)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_xlabel("global batch" if axes is by_batch else "GPUs", fontsize=9)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(PLOT, dpi=110)
