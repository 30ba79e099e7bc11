"""What a person looks at: the retrieval table, and a picture of queries with their best answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrep import printing
from mmrep.data.decode import decode
from mmrep.data.reader import Samples
from mmrep.errors import ConfigError
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.retrieval import (
    Direction,
    Gallery,
    Scorer,
    answerable,
    best_candidates,
    make_gallery,
    sample_groups,
)
from mmrep.files import replacing

TOP = 5
HEADINGS = (
    "direction",
    "queries",
    "candidates",
    "R@1 %",
    "95 %",
    "R@5 %",
    "R@10 %",
    "MRR",
    "median rank",
    "chance R@1 %",
)
"""Of the retrieval table, wherever it is shown."""
RIGHT, WRONG = "#1a9641", "#d7191c"
MOST_DRAWN = 400
"""Characters of a text in the picture, which has room for fewer."""


def print_table(result: Mapping[str, Any]) -> None:
    """Print the figures of `mmrep.evaluation.retrieval.retrieve`, a direction a line."""
    from rich.table import Table
    from rich.text import Text

    title = f"{result['checkpoint']} on {result['data']} ({result['split']}, {result['n']} samples)"
    table = Table(title=Text(title))  # Text: brackets of a path are no markup
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "direction" else "right")
    for direction, figures in result["directions"].items():
        table.add_row(Text(direction), *retrieval_cells(figures))
    printing.print_table(table)


def print_classification(result: Mapping[str, Any]) -> None:
    """Print the figures of `mmrep.evaluation.classification.classify` on one line."""
    from rich.table import Table
    from rich.text import Text

    title = f"zero-shot classification of '{result['modality']}': {result['checkpoint']} on {result['data']}"
    table = Table("samples", "left out", "classes", "prompts", title=Text(f"{title} ({result['split']})"))
    cells = [str(result["n"]), str(result["absent"] + result["unlabelled"]), str(result["classes"])]
    cells.append(str(result["prompts"]))
    names = {"acc1": "top-1 %", "acc5": "top-5 %", "mean_per_class_recall": "mean per class %"}
    names |= {"chance_acc1": "chance %", "mean_average_precision": "mAP %"}
    for name, heading in names.items():
        if name in result:
            table.add_column(heading, justify="right")
            cells.append("-" if result[name] is None else f"{100 * result[name]:.1f}")
    table.add_row(*cells)
    printing.print_table(table)


def print_probe(result: Mapping[str, Any]) -> None:
    """Print the figures of a probe, a kind of features a line."""
    from rich.table import Table
    from rich.text import Text

    title = f"{result['method']} probe of '{result['label']}' on '{result['modality']}', {result['data']} ({result['split']})"
    table = Table(title=Text(title))
    for heading in ("features", "width", "classes", "accuracy %", "95 %", "chance %", "chosen", "test samples"):
        table.add_column(heading, justify="left" if heading == "features" else "right")
    for name, figures in result["features"].items():
        low, high = figures["accuracy_ci95"]
        table.add_row(
            name,
            str(figures["features"]),
            str(figures["classes"]),
            f"{100 * figures['accuracy']:.1f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{100 * figures['chance']:.1f}",
            next(f"{name} {figures[name]:g}" for name in ("l2", "weight_decay", "k") if name in figures),
            str(figures["test"]),
        )
    printing.print_table(table)


def retrieval_cells(figures: Mapping[str, Any]) -> list[str]:
    """The figures of one direction under `HEADINGS`, but for its name."""
    counts = [str(figures["queries"]), str(figures["candidates"])]
    if not figures["queries"]:
        return [*counts, *["-"] * 7]
    low, high = figures["recall@1_ci95"]
    return [
        *counts,
        f"{100 * figures['recall@1']:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        f"{100 * figures['recall@5']:.1f}",
        f"{100 * figures['recall@10']:.1f}",
        f"{figures['mrr']:.3f}",
        f"{figures['median_rank']:g}",
        f"{100 * figures['chance_recall@1']:.2f}",
    ]


def check_drawing(path: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        ConfigError: If matplotlib is not installed, or draws no such file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ConfigError("drawing needs matplotlib", fix="pip install 'mmrep[viz]'") from error
    if _format(path) not in FigureCanvasBase.get_supported_filetypes():
        raise ConfigError(f"no picture is written as '{path.suffix}'", where=path, fix="name it FILE.png")


def _format(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or "png"


def draw_examples(
    path: Path, embeddings: Embeddings, scorer: Scorer, samples: Samples, direction: Direction, *, rows: int = 8
) -> None:
    """Draw evenly spaced queries, each with its best five candidates, right ones framed in green.

    Args:
        path: A PNG, or another file of `check_drawing`.
        embeddings: Of the whole of ``samples``, in its order.
        scorer: Whose rule ranks.
        samples: Where the raw samples are.
        direction: What is asked by what.
        rows: How many queries.

    Raises:
        ConfigError: If matplotlib is not installed, or nothing can be drawn.
    """
    check_drawing(path)
    from matplotlib.figure import Figure

    gallery, able = make_gallery(embeddings, direction.target), answerable(embeddings, direction)
    if not len(able) or not len(gallery.samples):
        raise ConfigError(f"no sample of the split can ask {direction}", where=path)
    queries = able[torch.linspace(0, len(able) - 1, min(rows, len(able))).long()]
    best = best_candidates(embeddings, scorer, direction, gallery, queries, TOP)
    figure = Figure(figsize=(1.7 * (len(direction.given) + 0.4 + TOP), 1.75 * len(queries) + 0.5), layout="constrained")
    widths = [1.6] * len(direction.given) + [1.0] * TOP
    axes = figure.subplots(len(queries), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    groups = sample_groups(embeddings)
    for line, query, answers in zip(axes, queries.tolist(), best, strict=True):
        for axis, modality in zip(line, direction.given, strict=False):
            _draw(axis, samples, query, modality)
        _draw_answers(
            line[len(direction.given) :], samples, direction, gallery, answers, gallery.groups == groups[query]
        )
    for axis, title in zip(
        axes[0], [*direction.given, *(f"{direction.target} {n + 1}" for n in range(TOP))], strict=True
    ):
        axis.set_title(title, fontsize=9, parse_math=False)
    with replacing(path) as part:
        figure.savefig(part, dpi=110, format=_format(path))


def _draw_answers(line: Any, samples: Samples, direction: Direction, gallery: Gallery, best: Any, right: Any) -> None:
    for axis, place in zip(line, best.tolist(), strict=False):
        _draw(axis, samples, int(gallery.samples[place]), direction.target)
        colour = RIGHT if bool(right[place]) else WRONG
        for side in axis.spines.values():
            side.set(visible=True, color=colour, linewidth=3)


def _draw(axis: Any, samples: Samples, number: int, modality: str) -> None:
    """One sample of one modality, raw, on one pair of axes."""
    extension = samples.extension_of(number, modality)
    axis.set(xticks=[], yticks=[])
    if extension is None:
        return
    kind = samples.index.modalities[modality].kind
    raw = decode(kind, extension, samples.read(number, extension), samples.where(number))
    if kind == "image":
        axis.imshow(raw)
    elif kind == "audio":
        dither = 1e-6 * np.random.default_rng(0).standard_normal(len(raw[0]))  # digital silence has no logarithm
        axis.specgram(raw[0] + dither, NFFT=512, Fs=raw[1], noverlap=384, cmap="magma")
        axis.set_ylim(0, 8000)
    elif kind == "text":
        text = printing.printable(raw[:MOST_DRAWN]).replace(" | ", "\n")
        axis.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=9, parse_math=False)
    else:
        axis.plot(raw.ravel())
