"""The picture: recall@1 over the share of missing modalities, a line per objective, a panel per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.compare.results import Row
from benchmarks.compare.settings import BY_NAME, MISSING, TASKS
from benchmarks.compare.table import figure

# Okabe and Ito's colours, which people see apart whatever their cones; markers and names at the lines say the same again.
COLOURS = ("#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#0072B2", "#8A7A00")
MARKERS = "osD^vPX*"
TITLES = {
    "joint": "Joint: which picture? audio+text->image\nno pair of modalities tells",
    "plain": "Plain: one modality finds another\nmean of six directions",
}
CEILING = 50.0
"""Of pairwise scores on the joint task, in %: two emoji are named in each text."""
GAP = 3.4
"""Least distance of two names at the ends of lines, in %."""
ASIDE = 0.5
"""How far each objective is moved sideways, so that the bars of all can be seen."""


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw what was measured."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11.0, 4.8), layout="constrained")
    for axes, task in zip(drawing.subplots(1, 2), TASKS, strict=True):
        _panel(axes, rows, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=130)


def _panel(axes: Any, rows: Sequence[Row], task: str) -> None:
    ends: dict[str, tuple[float, float]] = {}
    for number, (name, colour, marker) in enumerate(zip(BY_NAME, COLOURS, MARKERS, strict=True)):
        beside = ASIDE * (number - (len(BY_NAME) - 1) / 2)
        found = [(100 * share + beside, figure(rows, name, task, share)) for share in MISSING]
        points = [(x, 100 * f.mean, 100 * (f.spread or 0.0)) for x, f in found if f is not None]
        if points:
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=spread, color=colour, marker=marker, markersize=5, capsize=3, linewidth=1.5)
            ends[name] = (x[-1], y[-1])
    if ends:
        _name_lines(axes, ends)
    chances = [100 * row["chance"] for row in rows if row["task"] == task]
    if chances:
        _level(axes, chances[0], "chance")
    if task == "joint":
        _level(axes, CEILING, "pairwise ceiling")
    axes.set(xlabel="modalities missing in training, %", title=TITLES[task], ylim=(0, 100 if not ends else None))
    axes.set(ylabel="recall@1, %", xticks=[100 * share for share in MISSING], xlim=(-3, 100 * MISSING[-1] * 1.42))
    axes.spines[["top", "right"]].set_visible(False)


def _level(axes: Any, height: float, name: str) -> None:
    axes.axhline(height, color="grey", linestyle="--", linewidth=0.9, zorder=0)
    axes.annotate(name, (100 * MISSING[-1] * 1.42, height), ha="right", va="bottom", fontsize=7, color="grey")


def _name_lines(axes: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Each name beside the end of its line, moved apart where lines end together."""
    colours = dict(zip(BY_NAME, COLOURS, strict=True))
    heights = spread_out([end[1] for end in ends.values()], GAP)
    for (name, (x, y)), height in zip(ends.items(), heights, strict=True):
        edge = max(end[0] for end in ends.values()) + 4
        axes.plot([x, edge], [y, height], color=colours[name], linewidth=0.6, linestyle=":")
        axes.text(edge + 0.5, height, name, va="center", fontsize=8, color=colours[name])


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least ``gap`` apart, in the order of the given ones and near them: groups that are too near are centred."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    for number in order:
        groups.append([number])
        while len(groups) > 1 and _top(groups[-2], heights, gap) + gap > _bottom(groups[-1], heights, gap):
            last = groups.pop()
            groups[-1] += last
    placed = {n: _bottom(group, heights, gap) + gap * i for group in groups for i, n in enumerate(group)}
    return [placed[i] for i in range(len(heights))]


def _bottom(group: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[i] for i in group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[int], heights: Sequence[float], gap: float) -> float:
    return _bottom(group, heights, gap) + gap * (len(group) - 1)
