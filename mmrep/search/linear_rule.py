"""Whether a rule of scoring is linear in the candidate, so that an index of inner products can serve it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrep.errors import LossError

TOLERANCE = 1e-3
"""Of the largest score. What an index finds is scored again by the rule itself, so that rounding does no harm."""


def linear_queries(score: Callable[[Tensor], Tensor], sample: Tensor) -> Tensor | None:
    """The vectors whose inner product ranks candidates as the rule does.

    For a rule ``score(c) = w . c + b`` the scores of the identity's rows minus the score of zero are ``w``. Whether the
    rule is of that form is tried on some candidates.

    Args:
        score: Candidates ``[C, D]`` to scores ``[Q, C]``.
        sample: Some real candidates ``[S, D]``.

    Returns:
        ``w [Q, D]``; None if the rule is not linear (clusters, volumes).
    """
    width = sample.shape[1]
    try:
        offset = score(sample.new_zeros(1, width))
        queries = score(torch.eye(width, dtype=sample.dtype, device=sample.device)) - offset
        actual = score(sample)
    except LossError:  # a rule may refuse such rows
        return None
    error = (queries @ sample.T + offset - actual).abs().max()
    return queries if bool(error <= TOLERANCE * actual.abs().max()) else None  # NaN is no
