"""Ranks by counting: tile by tile, never the matrix of all scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]
"""From numbers of queries ``[q]`` and of candidates ``[c]`` to their scores ``[q, c]``."""

CPU_TILE, GPU_TILE = 1024, 16384
GPU_SCORE_MATRICES = 32
"""The part of a GPU's free memory that one matrix of scores may take: rules of triples make several."""
BLOCK = 64
"""Rows in whose multiples products are asked for: the last few of another number go through another kernel of the BLAS,
whose sums round otherwise, and equal rows would no longer tie."""


def tile_size(device: torch.device) -> int:
    """Queries and candidates scored at once: on a CPU few, for its caches; on a GPU as its free memory allows."""
    if device.type != "cuda":
        return CPU_TILE
    free, _ = torch.cuda.mem_get_info(device)
    side = math.isqrt(free // (4 * GPU_SCORE_MATRICES))
    return max(CPU_TILE, min(GPU_TILE, 1 << (max(1, side).bit_length() - 1)))


@dataclass(frozen=True)
class _Tile:
    """Some candidates, sorted by group: their numbers and groups ``[c]``, and the first and the last group."""

    numbers: Tensor
    groups: Tensor
    first: int
    last: int


def count_right_ranks(score: Score, asking: Tensor, offered: Tensor, tile: int) -> Tensor:
    """The rank of each query's best right answer: 1 + the wrong candidates that do not score less.

    Queries and candidates are taken in the order of their groups, so that the right answers to a tile of queries lie in few
    tiles of candidates. Those are scored twice, by the same products of the same rows, so that what ties once ties again:
    for the best right score, and with all others for the count.

    Args:
        score: Of queries and candidates.
        asking: int64 ``[Q]``, the groups of the queries.
        offered: int64 ``[C]``, the groups of the candidates: those of a query's group are right.
        tile: Queries and candidates scored at once.

    Returns:
        int64 ``[Q]``. A tie counts against the query, as does a score of NaN, and a query without a right answer is last.
    """
    ranks = torch.ones_like(asking)
    tiles = [_make_tile(numbers, offered) for numbers in offered.argsort(stable=True).split(tile) if len(numbers)]
    for queries in asking.argsort(stable=True).split(tile):
        if not len(queries):
            continue
        groups = asking[queries]
        low, high = int(groups[0]), int(groups[-1])
        near = [part for part in tiles if part.first <= high and part.last >= low]
        best = _best_right(score, queries, groups, near)
        for part in tiles:
            scores = score(queries, part.numbers)
            ranks[queries] += _count_not_less(scores, best)
            if part.first <= high and part.last >= low:
                right = part.groups == groups[:, None]
                ranks[queries] -= (right & ~(scores < best)).sum(dim=1)
    return ranks


def _make_tile(numbers: Tensor, offered: Tensor) -> _Tile:
    groups = offered[numbers]
    return _Tile(numbers, groups, int(groups[0]), int(groups[-1]))


def _best_right(score: Score, queries: Tensor, groups: Tensor, tiles: Sequence[_Tile]) -> Tensor:
    """The best score of a right answer ``[q, 1]``; -inf for none."""
    best = torch.full((len(queries), 1), -torch.inf, device=queries.device)
    for part in tiles:
        scores = score(queries, part.numbers)
        right = part.groups == groups[:, None]
        best = torch.maximum(best, scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True))
    return best


def _count_not_less(scores: Tensor, best: Tensor) -> Tensor:
    """How many scores of each row are not below its best: int64 ``[q]``.

    Zeros and ones as fp32, whose sum is exact up to 2**24: torch sums booleans ten times slower.
    """
    less = torch.empty_like(scores, dtype=torch.float32)
    return scores.shape[1] - torch.lt(scores, best, out=less).sum(dim=1).long()


def in_blocks(numbers: Tensor) -> Tensor:
    """Numbers ``[n]``, the last repeated up to a multiple of `BLOCK`: rows taken by them are multiplied by one kernel."""
    return torch.cat([numbers, numbers[-1:].expand(-len(numbers) % BLOCK)])
