"""Search by an approximate index: it chooses candidates, and the model's rule scores them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrep.progress import progress
from mmrep.search import faiss_index
from mmrep.search.linear_rule import linear_queries
from mmrep.search.top_k import RunningTopK

if TYPE_CHECKING:
    from mmrep.search.index import EmbeddingIndex

SPARE = 4
"""Times k: candidates that are taken from the index to be scored."""
SAMPLE = 256
"""Candidates on which it is tried whether a rule is linear."""


def approximate_search(
    index: EmbeddingIndex, given: Mapping[str, Tensor], target: str, k: int
) -> list[tuple[Tensor, Tensor]] | str:
    """For each query the scores and numbers ``[1, k]`` of the best candidates that faiss chose, as `RunningTopK` gives them.

    The faiss index is built if there is none of the present manifest; of candidates with equal contents it has the first.

    Returns:
        Or why it cannot be done, in words.
    """
    if not faiss_index.faiss_installed():
        return "faiss is not installed (pip install 'mmrep[search]')"
    sample = next(rows for _, rows, _ in index.tiles(target) if len(rows))[:SAMPLE]
    queries = linear_queries(lambda candidates: index.score(target, given, candidates), sample)
    if queries is None:
        return f"the rule of {type(index.model.loss).__name__} is not linear in the candidate"
    if not faiss_index.is_built(index.folder, target):
        _build(index, target)
    chosen = faiss_index.nearest(index.folder, target, queries, min(SPARE * k, index.count(target)))
    found = []
    for query, (numbers, candidates) in enumerate(zip(*chosen, strict=True)):
        running = RunningTopK(1, k)
        known, order = numbers[numbers >= 0].sort()  # by number: ties are settled as in an exact search
        if len(known):
            one = {name: rows[query : query + 1] for name, rows in given.items()}
            running.add(index.score(target, one, candidates[numbers >= 0][order]), known)
        found.append(running.result())
    return found


def _build(index: EmbeddingIndex, target: str) -> None:
    """Passes over the rows: to find the first of each content, to find the cells, and to fill them."""
    with progress(f"building index-{target}.faiss", 3 * index.count(target), "rows") as advance:

        def noted() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for tile in index.tiles(target):
                yield tile
                advance(len(tile[0]))

        contents = np.concatenate([contents.numpy() for _, _, contents in noted()])
        first = np.zeros(len(contents), bool)
        first[np.unique(contents, return_index=True)[1]] = True

        def tiles() -> Iterator[tuple[Tensor, Tensor]]:
            start = 0
            for numbers, rows, _ in noted():
                distinct = torch.from_numpy(first[start : start + len(rows)])
                yield numbers[distinct], rows[distinct]
                start += len(rows)

        width = index.manifest.source.embed_dim
        faiss_index.build(index.folder, target, tiles, rows=int(first.sum()), width=width)
