"""Queries with their best answers as HTML: pictures, captions and audio players, the right ones marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import torch

from mmrep.data.html_members import read_members
from mmrep.data.reader import Samples
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.retrieval import (
    Direction,
    Scorer,
    answerable,
    best_candidates,
    make_gallery,
    sample_groups,
)

TOP = 5
MAX_BYTES = 24 << 20
"""Of all examples together; the page says what was left out."""


def examples(
    embeddings: Embeddings, scorer: Scorer, samples: Samples, directions: Sequence[Direction], queries: int
) -> Iterator[str]:
    """A section for each direction: evenly spaced queries, each with its best five candidates.

    Args:
        embeddings: Of the whole of ``samples``, in its order.
        scorer: Whose rule ranks.
        samples: Where the raw samples are.
        directions: What is asked by what; those that no sample can ask are left out.
        queries: How many of each.
    """
    total = 0
    for number, direction in enumerate(directions):
        if total > MAX_BYTES:
            left = len(directions) - number
            yield f'<p class="why">{left} more directions are not shown: the page would be too large.</p>\n'
            return
        section = _section(embeddings, scorer, samples, direction, queries)
        total += len(section)
        if section:
            state = " open" if number == 0 else ""
            yield f"<details{state}><summary>{escape(str(direction))}</summary>\n{section}</details>\n"


def _section(embeddings: Embeddings, scorer: Scorer, samples: Samples, direction: Direction, queries: int) -> str:
    gallery, able = make_gallery(embeddings, direction.target), answerable(embeddings, direction)
    if not len(able) or not len(gallery.samples):
        return ""
    chosen = able[torch.linspace(0, len(able) - 1, min(queries, len(able)), device=able.device).long()]
    best = best_candidates(embeddings, scorer, direction, gallery, chosen, TOP)
    groups = sample_groups(embeddings)
    rows = []
    for query, answers in zip(chosen.tolist(), best.tolist(), strict=True):
        cards = [_card(samples, query, direction.given, "query", "query")]
        for rank, place in enumerate(answers, 1):
            right = bool(gallery.groups[place] == groups[query])
            mark = "\N{CHECK MARK} right" if right else "\N{MULTIPLICATION SIGN} wrong"
            kind = "right" if right else "wrong"
            cards.append(_card(samples, int(gallery.samples[place]), (direction.target,), kind, f"{rank}. {mark}"))
        rows.append(f'<div class="row">{"".join(cards)}</div>\n')
    return "".join(rows)


def _card(samples: Samples, number: int, modalities: Sequence[str], kind: str, heading: str) -> str:
    shown = "".join(
        f"<p><small>{escape(member.name)}</small> {member.html}</p>"
        for member in read_members(samples, number, modalities)
    )
    key = escape(samples.key(number))
    label = escape(f"{heading}: {', '.join(modalities)} of {samples.key(number)}")
    header = f"<header>{escape(heading)}<br><small>{key}</small></header>"
    return f'<div class="card {kind}" role="group" aria-label="{label}">{header}{shown}</div>'
