"""What a run took, over all ranks: rates, shares of the time, peak memory. Numbers in, numbers and text out."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmrep.ops.step_clock import CHECKPOINT, PARTS, VALIDATION


def throughput(
    seconds: Mapping[str, Sequence[float]], samples: Sequence[int], *, steps: int, warmup_steps: int
) -> dict[str, Any]:
    """Rates and shares of a run.

    Args:
        seconds: Part of the step -> seconds of each rank.
        samples: Of each rank.
        steps: Optimiser steps, the same on all ranks.
        warmup_steps: Steps before those, which are in no figure.

    Returns:
        ``samples_per_second`` and ``steps_per_second`` of the time that is neither validation nor checkpoints; ``shares`` of
        the whole time, means over the ranks, which add up to 1; and the ``seconds`` of each rank.
    """
    ranks = len(samples)
    means = {part: sum(values) / ranks for part, values in seconds.items()}
    whole = sum(means.values())
    training = whole - means[VALIDATION] - means[CHECKPOINT]
    return {
        "ranks": ranks,
        "warmup_steps": warmup_steps,
        "steps": steps,
        "samples": sum(samples),
        "wall_seconds": whole,
        "training_seconds": training,
        "samples_per_second": sum(samples) / training if training > 0 else None,
        "steps_per_second": steps / training if training > 0 else None,
        "shares": {part: means[part] / whole if whole > 0 else 0.0 for part in PARTS},
        "seconds": {part: list(seconds[part]) for part in PARTS},
    }


def peak_memory() -> dict[str, int]:
    """Bytes: the most that this process held, ``host``, and the most that tensors took on its GPU, ``cuda``.

    The host's is of the process since it began, without the loader's processes.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host": host, "cuda": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def lines(report: Mapping[str, Any]) -> str:
    """The report as an aligned table."""
    shown = [_heading(report)]
    several = report["ranks"] > 1
    if several:
        shown.append(f"  {'':<20}{'mean':>10}{'least (rank)':>18}{'most (rank)':>18}")
    for part, share in report["shares"].items():
        line = f"  {part:<20}{100 * share:>8.1f} %"
        if several:
            values = report["seconds"][part]
            totals = [sum(report["seconds"][name][rank] for name in PARTS) for rank in range(report["ranks"])]
            of_ranks = [value / total if total else 0.0 for value, total in zip(values, totals, strict=True)]
            line += _extremes([f"{100 * value:.1f} %" for value in of_ranks], of_ranks)
        shown.append(line)
    for name, bytes_ in report["peak_memory_bytes"].items():
        if any(bytes_):
            line = f"  {'peak memory, ' + name:<20}{sum(bytes_) / len(bytes_) / 2**30:>6.2f} GiB"
            shown.append(
                line + (_extremes([f"{value / 2**30:.2f} GiB" for value in bytes_], bytes_) if several else "")
            )
    return "\n".join(shown)


def _heading(report: Mapping[str, Any]) -> str:
    rate, steps = report["samples_per_second"], report["steps_per_second"]
    rates = "no step was timed" if rate is None else f"{rate:,.1f} samples/s, {steps:,.2f} steps/s"
    left_out = (
        f", the first {report['warmup_steps']} left out" if report["warmup_steps"] else ", the first ones included"
    )
    ranks = f" on {report['ranks']} ranks" if report["ranks"] > 1 else ""
    return f"throughput: {rates}{ranks} ({report['steps']} steps{left_out}); share of the time:"


def _extremes(texts: Sequence[str], values: Sequence[float]) -> str:
    least, most = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
    return f"{f'{texts[least]} ({least})':>18}{f'{texts[most]} ({most})':>18}"
