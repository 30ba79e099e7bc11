"""Zero-shot retrieval in every direction, by the loss's own score, with ranks counted in a stream of tiles.

For one direction, "given -> target":

- The gallery is every sample that has the target; samples of one group with identical content are one candidate.
- A query is every sample that has all that is given and whose group the gallery holds. Others cannot ask, and are no misses.
- Right answers are the candidates of the query's group. The rank is 1 + the number of wrong candidates that do not score less
  than the best right one: other right answers are not in the way, and a tie counts against the query, as does NaN.
- recall@k is the share of ranks up to k; with a gallery of no more than k candidates it is 1.
- Without any query every figure is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmrep.errors import LossError, MmrepError, did_you_mean
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.metrics import summarize
from mmrep.evaluation.ranks import Score, count_right_ranks, in_blocks, tile_size
from mmrep.ops.gather import gather_rows, rank, world_size

PART = 8192
"""Rows that are looked at together."""


class Scorer(Protocol):
    """What retrieval asks of a model or a loss: see `mmrep.losses.base.Loss.score`."""

    def score(self, *, target: str, candidates: Tensor, given: Mapping[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Direction:
    """Find ``target`` by the modalities in ``given``."""

    given: tuple[str, ...]
    target: str

    def __str__(self) -> str:
        return f"{'+'.join(sorted(self.given))}->{self.target}"

    @classmethod
    def parse(cls, text: str, modalities: Sequence[str]) -> Direction:
        """Read ``audio+text->image``.

        Raises:
            MmrepError: If it is not of that form, or names an unknown modality.
        """
        given, arrow, target = text.partition("->")
        names = tuple(sorted(set(given.split("+"))))
        for name in (*names, target):
            if name not in modalities:
                raise MmrepError(f"direction '{text}': no modality '{name}'", fix=did_you_mean(name, modalities))
        if not arrow or target in names:
            raise MmrepError(f"'{text}' is no direction", fix="write it as audio+text->image")
        return cls(names, target)


def all_directions(modalities: Sequence[str]) -> list[Direction]:
    """Every single direction and, with three modalities or more, every "all others to one"."""
    names = sorted(modalities)
    directions = [Direction((given,), target) for given in names for target in names if given != target]
    if len(names) > 2:
        directions += [Direction(tuple(n for n in names if n != target), target) for target in names]
    return directions


@dataclass(frozen=True)
class Gallery:
    """The distinct candidates of a direction: ``rows [C, D]``, their groups ``[C]``, and the samples they come from."""

    rows: Tensor
    groups: Tensor
    samples: Tensor


def make_gallery(embeddings: Embeddings, target: str) -> Gallery:
    """All samples that have the target; those of one group with identical content are one candidate.

    A table that repeats a picture for each of its captions thus has each picture once in its gallery, and a query cannot
    be beaten by copies of one wrong answer.
    """
    samples = embeddings.present[target].nonzero()[:, 0]
    groups = sample_groups(embeddings)[samples]
    content = embeddings.labels.get(f"@content:{target}")
    if content is not None:
        identity = torch.stack([groups, content[samples]], dim=1)
        _, inverse = identity.unique(dim=0, return_inverse=True)
        numbers = torch.arange(len(samples), device=samples.device)
        distinct = int(inverse.max()) + 1 if len(inverse) else 0
        first = numbers.new_full((distinct,), len(samples)).scatter_reduce(0, inverse, numbers, "amin")
        keep = first.sort().values
        samples, groups = samples[keep], groups[keep]
    rows = embeddings.rows[target]
    return Gallery(rows if len(samples) == len(rows) else rows[samples], groups, samples)


def sample_groups(embeddings: Embeddings) -> Tensor:
    """int64 ``[N]``: samples with equal numbers are right answers to each other; without labels each is its own group."""
    own = -2 - torch.arange(len(embeddings), device=next(iter(embeddings.rows.values())).device)
    group = embeddings.labels.get("@group")
    return own if group is None else torch.where(group >= 0, group, own)


@dataclass(frozen=True)
class Ranked:
    """A direction's queries, ranked: int64 ``[Q]`` on the CPU, from 1; ``candidates`` in the gallery, ``chance`` of rank 1."""

    ranks: np.ndarray
    candidates: int
    chance: float

    def figures(self) -> dict[str, Any]:
        """See `mmrep.evaluation.metrics.summarize`."""
        return summarize(self.ranks, candidates=self.candidates, chance=self.chance)


def retrieve(
    embeddings: Embeddings,
    scorer: Scorer,
    directions: Sequence[Direction] | None = None,
    *,
    tile: int | None = None,
) -> dict[str, dict[str, Any]]:
    """The figures of every direction: what `rank_queries` found, summarised by `mmrep.evaluation.metrics.summarize`.

    A collective, as that.
    """
    return {
        str(direction): found.figures()
        for direction, found in rank_queries(embeddings, scorer, directions, tile=tile).items()
    }


def rank_queries(
    embeddings: Embeddings,
    scorer: Scorer,
    directions: Sequence[Direction] | None = None,
    *,
    tile: int | None = None,
) -> dict[Direction, Ranked]:
    """The ranks of every direction. A collective: every rank calls it with the same embeddings, and ranks its share of the
    queries, on the device of the embeddings.

    Args:
        embeddings: A whole split.
        scorer: Whose rule ranks.
        directions: What to evaluate; `all_directions` by default, but for those that the loss cannot score.
        tile: Queries and candidates that are scored at once: memory is ``tile * tile``, never queries x candidates; by
            default as `mmrep.evaluation.ranks.tile_size` finds right.

    Returns:
        Direction -> the ranks of all queries.

    Raises:
        MmrepError: On rows that are not finite: NaN compares as false, and would count as a perfect rank.
    """
    for name, rows in embeddings.rows.items():
        finite = [
            part.isfinite().all(dim=1) for part in rows.split(PART)
        ]  # in parts: it takes as much memory as they do
        if finite and not bool(torch.cat(finite)[embeddings.present[name]].all()):
            raise MmrepError(
                f"embeddings of '{name}' hold NaN or infinity", fix="the model has diverged; lower the learning rate"
            )
    ranked = {}
    for direction in directions if directions is not None else all_directions(list(embeddings.rows)):
        try:
            _try_scoring(embeddings, scorer, direction)
        except LossError:
            if directions is not None:
                raise
            continue
        ranked[direction] = _ranked(embeddings, scorer, direction, tile)
    return ranked


def _try_scoring(embeddings: Embeddings, scorer: Scorer, direction: Direction) -> None:
    """Score one made-up query, on every rank: whether a loss can score a direction must not depend on who has queries.

    Raises:
        LossError: If it cannot.
    """
    rows = next(iter(embeddings.rows.values()))
    one = rows.new_ones(1, rows.shape[1])  # as wide as the rows, of which there may be none
    scorer.score(target=direction.target, candidates=one, given=dict.fromkeys(direction.given, one))


def _ranked(embeddings: Embeddings, scorer: Scorer, direction: Direction, tile: int | None) -> Ranked:
    gallery = make_gallery(embeddings, direction.target)
    queries = answerable(embeddings, direction)
    mine = queries.tensor_split(world_size())[rank()]
    ranks = gather_rows(count_ranks(embeddings, scorer, direction, gallery, mine, tile))
    known, sizes = gallery.groups.unique(return_counts=True)
    right = int(sizes[torch.searchsorted(known, sample_groups(embeddings)[queries])].sum())
    chance = right / max(1, len(queries)) / max(1, len(gallery.groups))
    return Ranked(ranks.cpu().numpy(), len(gallery.groups), chance)


def answerable(embeddings: Embeddings, direction: Direction) -> Tensor:
    """Numbers of the samples that can ask: they have all that is given, and the gallery has a right answer."""
    groups = sample_groups(embeddings)
    able = torch.stack([embeddings.present[name] for name in direction.given]).all(dim=0)
    able &= torch.isin(groups, groups[embeddings.present[direction.target]])
    return able.nonzero()[:, 0]


def count_ranks(
    embeddings: Embeddings,
    scorer: Scorer,
    direction: Direction,
    gallery: Gallery,
    queries: Tensor,
    tile: int | None = None,
) -> Tensor:
    """int64 ``[Q]``, from 1: one more than the wrong candidates that do not score less than the best right one."""
    score = _scoring(embeddings, scorer, direction, gallery, queries)
    asking = sample_groups(embeddings)[queries]
    return count_right_ranks(score, asking, gallery.groups, tile or tile_size(queries.device))


def _scoring(embeddings: Embeddings, scorer: Scorer, direction: Direction, gallery: Gallery, queries: Tensor) -> Score:
    """Scores of queries and candidates by their places in ``queries`` and in the gallery."""

    def score(asking: Tensor, offered: Tensor) -> Tensor:
        samples = queries[in_blocks(asking)]
        given = {name: embeddings.rows[name][samples] for name in direction.given}
        candidates = gallery.rows[in_blocks(offered)]
        scores = scorer.score(target=direction.target, candidates=candidates, given=given)
        return scores[: len(asking), : len(offered)]

    return score


def best_candidates(
    embeddings: Embeddings, scorer: Scorer, direction: Direction, gallery: Gallery, queries: Tensor, k: int
) -> Tensor:
    """Places in the gallery ``[Q, min(k, C)]`` of the best candidates, best first; the gallery is scored tile by tile."""
    score = _scoring(embeddings, scorer, direction, gallery, queries)
    asking, places = torch.arange(len(queries), device=queries.device), queries.new_zeros(len(queries), 0)
    best = torch.zeros(len(queries), 0, device=queries.device)
    for offered in torch.arange(len(gallery.groups), device=queries.device).split(tile_size(queries.device)):
        scores = torch.cat([best, score(asking, offered)], dim=1)
        numbers = torch.cat([places, offered.expand(len(queries), -1)], dim=1)
        best, found = scores.topk(min(k, scores.shape[1]), dim=1)
        places = numbers.gather(1, found)
    return places
