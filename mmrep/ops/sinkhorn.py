"""Sinkhorn-Knopp: from scores to codes that use every prototype equally, over the rows of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmrep.ops.gather import gather_stacked
from mmrep.ops.multilinear import in_fp32

SAFE_RANGE = 50.0
"""Largest difference of two logits whose exponentials, times scaling vectors, stay in fp32: ``1.5 x 50 + log n < 87``."""

Steps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""Log sums of columns under log scales of rows; of rows under those of columns; codes of valid rows under these."""


@torch.no_grad()
def sinkhorn(
    scores: Tensor, valid: Tensor, *, epsilon: float, iterations: int, groups: Sequence[int] | None = None
) -> Tensor:
    """Soft codes of A views by Sinkhorn-Knopp (Caron et al. 2020, equation 3 and appendix A).

    An iteration gives every prototype the same mass over the rows of all ranks, then every row the mass 1. The usual division
    by the number of rows, which goes wrong as soon as ranks have unequal numbers of them, is not needed: it cancels. The
    matrix stays as it is, and two vectors of scales are found (Cuturi 2013), by products with exponentials where the range
    of this rank's logits allows it, and else by log-sum-exps, so that no ``epsilon`` overflows. The ranks exchange logarithms
    in either case, one collective an iteration, of A x K numbers.

    Args:
        scores: ``[A, n, K]``, this rank's rows against K prototypes; ``n`` may differ between ranks, and be 0.
        valid: bool ``[A, n]``; other rows take no part, and their codes are 0.
        epsilon: Smoothness: scores are divided by it.
        iterations: At least 1.
        groups: Views of one number share a marginal: a prototype has its mass over all of them together. By default every
            view has its own.

    Returns:
        Codes ``[A, n, K]``, at least fp32, rows sum to 1, without gradients.
    """
    column_sums, row_sums, codes = _steps(in_fp32(scores), epsilon)
    columns = in_fp32(scores).new_zeros(len(scores), scores.shape[2])
    rows = torch.zeros_like(valid, dtype=columns.dtype)
    for iteration in range(iterations):
        if iteration:
            rows = -row_sums(columns)
        masses = gather_stacked(column_sums(rows.masked_fill(~valid, -torch.inf))).logsumexp(dim=0)
        columns = -_over_groups(masses, groups)
    return codes(columns, valid)


def _steps(scores: Tensor, epsilon: float) -> Steps:
    if scores.numel():
        lowest, highest = torch.aminmax(scores)
        if (highest - lowest) / epsilon <= SAFE_RANGE:
            centre = (lowest + highest) / (2 * epsilon)
            return _by_scaling(torch.add(-centre, scores, alpha=1 / epsilon).exp_(), centre)
    return _in_logarithms(scores / epsilon)


def _by_scaling(exponentials: Tensor, centre: Tensor) -> Steps:
    """Of logits less their centre."""

    def weighted(matrices: Tensor, logs: Tensor) -> Tensor:
        highest = logs.amax(dim=1, keepdim=True).clamp(min=torch.finfo(logs.dtype).min)
        weights = (logs - highest).exp()
        sums = [matrix @ weight for matrix, weight in zip(matrices, weights, strict=True)]
        return torch.stack(sums).log_() + (highest + centre)

    def codes(columns: Tensor, valid: Tensor) -> Tensor:
        highest = columns.amax(dim=1, keepdim=True)
        exponentials.mul_((columns - highest).exp()[:, None])
        return exponentials.mul_((valid / exponentials.sum(dim=2))[..., None])

    return lambda rows: weighted(exponentials.mT, rows), lambda columns: weighted(exponentials, columns), codes


def _in_logarithms(logits: Tensor) -> Steps:
    return (
        lambda rows: (logits + rows[..., None]).logsumexp(dim=1),
        lambda columns: (logits + columns[:, None]).logsumexp(dim=2),
        lambda columns, valid: (logits + columns[:, None]).softmax(dim=2) * valid[..., None],
    )


def _over_groups(masses: Tensor, groups: Sequence[int] | None) -> Tensor:
    """Log masses ``[A, K]`` of each view's group; 0 where a group has no row at all, so that nothing becomes NaN."""
    if groups is not None:
        number = torch.tensor(groups, device=masses.device)
        masses = torch.stack([masses[number == group].logsumexp(dim=0) for group in groups])
    return masses.masked_fill(masses == -torch.inf, 0.0)
