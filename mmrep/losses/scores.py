"""What the losses' rules of ranking share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmrep.losses.checks import Embeddings, Presence
from mmrep.ops.multilinear import in_fp32


def inner_products(
    candidates: Tensor, given: Embeddings, present: Presence | None, scales: Mapping[str, Tensor | float]
) -> Tensor:
    """``sum_m s_m r_m . c`` ``[Q, C]`` over what is given and there: the score of every objective of pairs."""
    queries = []
    for name, rows in given.items():
        query = scales[name] * in_fp32(rows)
        queries.append(query if present is None else query * present[name][:, None])
    scores: Tensor = torch.stack(queries).sum(dim=0) @ in_fp32(candidates).T
    return scores


def presence_patterns(given: Embeddings, present: Presence | None) -> list[tuple[list[str], Tensor]]:
    """Which modalities the queries have: each pattern that occurs, with the numbers of its queries."""
    names = list(given)
    device = given[names[0]].device
    if present is None:
        return [(names, torch.arange(len(given[names[0]]), device=device))]
    patterns, which = torch.stack([present[name] for name in names], dim=1).unique(dim=0, return_inverse=True)
    return [
        ([name for name, there in zip(names, pattern, strict=True) if there], (which == number).nonzero()[:, 0])
        for number, pattern in enumerate(patterns.tolist())
    ]
