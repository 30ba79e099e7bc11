"""The report of a run as one page: what the model is, how well it retrieves, how it trained, how its embeddings lie.

No script, no link; whatever comes from data or config is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mmrep.data.html_page import evenly_spaced, table, write_page
from mmrep.data.reader import Samples
from mmrep.evaluation.curves import Curve
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.examples_page import examples
from mmrep.evaluation.geometry import geometry
from mmrep.evaluation.projection import project
from mmrep.evaluation.report import HEADINGS, retrieval_cells
from mmrep.evaluation.retrieval import Direction, Ranked, rank_queries
from mmrep.evaluation.svg import Axis, Point, line_chart, scatter
from mmrep.model import MultimodalModel

MOST_K = 100
"""Recall curves go up to this k."""
TICKS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
MOST_POINTS = 300
"""Of a modality, in the projection: evenly spaced ones."""
STYLE = """\
.chart { max-width: 560px; } .facts td + td { white-space: normal; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 20px; }
td.gap { min-width: 64px; text-align: center; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px; margin: 10px 0 22px; }
.card.right { border: 3px solid #009e73; } .card.wrong { border-style: dashed; } .card.query { background: #8882; }
"""


@dataclass(frozen=True)
class Evaluated:
    """A model and a split that it embedded.

    Attributes:
        name: Of the model, for the title.
        model: On the device of the embeddings.
        data: Where the shards are.
        split, samples: What of it.
        embeddings: Of the whole of ``samples``, in its order.
    """

    name: str
    model: MultimodalModel
    data: str
    split: str
    samples: Samples
    embeddings: Embeddings


def write_report(path: Path, evaluated: Evaluated, *, curves: Mapping[str, Curve], queries: int = 4) -> dict[str, Any]:
    """Write the page.

    Args:
        path: Of the page.
        evaluated: What it is about.
        curves: Of the training, as `mmrep.evaluation.curves.read_curves` gives; none where there is no run folder.
        queries: Examples of each direction.

    Returns:
        The figures of retrieval, as `mmrep.evaluation.retrieval.retrieve` gives.

    Raises:
        MmrepError: On embeddings that are not finite, or a shard that cannot be read.
    """
    embeddings, model = evaluated.embeddings, evaluated.model
    ranked = rank_queries(embeddings, model)
    figures = {str(direction): found.figures() for direction, found in ranked.items()}
    title = f"Report of {evaluated.name}"
    parts = [
        f"<h1>{escape(title)}</h1>\n",
        "<h2>Model and data</h2>\n",
        f'<div class="facts">{table(("", ""), facts(evaluated), (0, 1))}</div>\n',
        "<h2>Retrieval</h2>\n",
        table(HEADINGS, [(name, *retrieval_cells(line)) for name, line in figures.items()], (0,)),
        '<p class="muted">R@k: share of the queries with a right answer among the first k. A tie counts against the query. '
        "95 %: bootstrap interval of R@1.</p>\n",
        "<h2>Recall over k</h2>\n",
        *_charts(recall_charts(ranked)),
        "<h2>Training</h2>\n" if curves else "",
        *(_charts(training_charts(curves)) if curves else []),
        "<h2>Where the embeddings lie</h2>\n",
        gap_table(embeddings),
        *_charts([projection_chart(embeddings)]),
        "<h2>Examples</h2>\n",
        *examples(embeddings, model, evaluated.samples, list(ranked), queries),
    ]
    write_page(path, title, parts, style=STYLE)
    return figures


def facts(evaluated: Evaluated) -> list[tuple[str, str]]:
    """What the model and the data are, as rows of a table."""
    model, samples, config = evaluated.model, evaluated.samples, evaluated.model.config()
    rows = [("model", evaluated.name)]
    for name, encoder in model.by_modality.items():
        described = config["encoders"][model.share.get(name, name)]
        count = sum(parameter.numel() for parameter in encoder.parameters())
        shared = f", shared with {model.share[name]}" if name in model.share else ""
        rows.append((name, f"{encoder.kind}: {_described(described)}, {count:,} parameters{shared}"))
    rows += [
        ("loss", _described(config["loss"])),
        ("embeddings", f"{model.embed_dim} numbers, normalised by {model.normalize}"),
        ("data", f"{evaluated.data}, fingerprint {samples.index.fingerprint[:12]}"),
        ("split", f"{evaluated.split}, {len(evaluated.embeddings)} samples"),
    ]
    return rows


def _described(part: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in part["settings"].items())
    return f"{part['class']}({settings})"


def recall_charts(ranked: Mapping[Direction, Ranked]) -> Iterator[str]:
    """Recall over k, a chart for each target, a line for each direction."""
    for target in dict.fromkeys(direction.target for direction in ranked):
        curves = {
            str(direction): recall_curve(found.ranks, min(MOST_K, found.candidates))
            for direction, found in ranked.items()
            if direction.target == target and len(found.ranks)
        }
        if curves:
            most = max(len(curve) for curve in curves.values())
            x = Axis("k", 1, max(2, most), log=True, ticks=tuple(tick for tick in TICKS if tick <= max(2, most)))
            yield line_chart(f"Finding {target}", curves, x, Axis("recall@k, %", 0, 100))


def recall_curve(ranks: np.ndarray, most: int) -> list[Point]:
    """Recall@k in percent for every k up to ``most``, from ranks int ``[Q]``, Q at least 1."""
    found = np.searchsorted(np.sort(ranks), np.arange(1, most + 1), side="right") / len(ranks)
    return [(float(k), 100 * float(share)) for k, share in enumerate(found, 1)]


TRAINING = {
    "Loss": ("loss", ("train/loss", "val/loss")),
    "Recall@1 on the validation split": ("recall@1", ("val/*/recall@1",)),
    "Modality gap": ("distance of centres", ("val/modality_gap/*",)),
    "Alignment of pairs": ("mean squared distance", ("val/alignment/*",)),
    "Logit scale": ("scale", ("train/logit_scale",)),
}
"""Charts of the training: label of the vertical axis, and patterns of columns."""


def training_charts(curves: Mapping[str, Curve]) -> Iterator[str]:
    """What the CSV of a run tells, a chart for each kind of figure that it has."""
    for title, (label, patterns) in TRAINING.items():
        shown = {
            _varying(name, pattern): _thinned(curve)
            for pattern in patterns
            for name, curve in curves.items()
            if curve and fnmatchcase(name, pattern)
        }
        if shown:
            points = [point for curve in shown.values() for point in curve]
            x = Axis.around("step", [step for step, _ in points], margin=0)
            yield line_chart(title, shown, x, Axis.around(label, [value for _, value in points]))


def _varying(name: str, pattern: str) -> str:
    """What stands for the ``*`` of a pattern; the whole name where there is none."""
    before, star, after = pattern.partition("*")
    return name.removeprefix(before).removesuffix(after) if star else name


def _thinned(curve: Curve, most: int = 400) -> Curve:
    """Evenly spaced points of a long curve, and its last."""
    kept = [curve[place] for place in evenly_spaced(len(curve), most)]
    return kept if kept[-1] == curve[-1] else [*kept, curve[-1]]


def gap_table(embeddings: Embeddings) -> str:
    """The distance of the centres of every two modalities, the larger the darker, and how each modality spreads."""
    figures = {name: float(value) for name, value in geometry(embeddings.rows, embeddings.present).items()}
    names = list(embeddings.rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = [f'<tr><th class="words">modality gap</th>{head}<th>uniformity</th></tr>']
    for a in names:
        line = "".join(_gap_cell(a, b, figures) for b in names)
        spread = figures.get(f"uniformity/{a}")
        own = "\N{EN DASH}" if spread is None else f"{spread:.2f}"
        lines.append(f'<tr><th class="words">{escape(a)}</th>{line}<td>{own}</td></tr>')
    pairs = "; ".join(
        f"{name.partition('/')[2]} {value:.2f}" for name, value in figures.items() if name.startswith("alignment/")
    )
    return (
        '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>\n"
        '<p class="muted">Modality gap: distance of the centres of two modalities on the unit sphere, from 0 to 2. '
        "Uniformity: 0 where all rows are equal, down to \N{MINUS SIGN}4 where they spread over the sphere. "
        f"Alignment, the mean squared distance of pairs: {escape(pairs) or 'no pairs'}.</p>\n"
    )


def _gap_cell(a: str, b: str, figures: Mapping[str, float]) -> str:
    gap = figures.get(f"modality_gap/{a}-{b}", figures.get(f"modality_gap/{b}-{a}"))
    if a == b or gap is None:
        return '<td class="gap">\N{EN DASH}</td>'
    shade = 0.5 * min(1.0, gap / 2)  # never so dark that the figure is not read
    return f'<td class="gap" style="background: rgb(0 114 178 / {shade:.2f})">{gap:.2f}</td>'


def projection_chart(embeddings: Embeddings) -> str:
    """Rows of all modalities in the plane of their first two principal components."""
    width = next(iter(embeddings.rows.values())).shape[1]
    if width < 2 or not any(bool(mask.any()) for mask in embeddings.present.values()):
        return ""
    projection = project(embeddings.rows, embeddings.present)
    points = {
        f"{name} ({len(all_points)} rows)": [
            (float(x), float(y)) for x, y in all_points[evenly_spaced(len(all_points), MOST_POINTS)].tolist()
        ]
        for name, all_points in projection.points.items()
    }
    shown = [point for each in points.values() for point in each]
    labels = [f"component {n + 1} ({share:.0%} of the variance)" for n, share in enumerate(projection.shares)]
    x, y = (Axis.around(labels[n], [point[n] for point in shown]) for n in (0, 1))
    return scatter("All modalities, projected", points, x, y)


def _charts(charts: Iterator[str] | Sequence[str]) -> list[str]:
    return ['<div class="charts">\n', *charts, "</div>\n"]
