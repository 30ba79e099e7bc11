"""Sinkhorn-Knopp: from scores to codes that use every prototype equally, over the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrep.ops.gather import gather_stacked
from mmrep.ops.multilinear import in_fp32


@torch.no_grad()
def sinkhorn(
    scores: Tensor, valid: Tensor, *, epsilon: float, iterations: int, groups: Sequence[int] | None = None
) -> Tensor:
    """Soft codes of A views by Sinkhorn-Knopp in the log domain (Caron et al. 2020, equation 3 and appendix A).

    An iteration gives every prototype the same mass over the rows of all ranks, then every row the mass 1. In the log
    domain no ``epsilon`` overflows, and the usual division by the number of rows, which goes wrong as soon as ranks have
    unequal numbers of them, is not needed: it cancels. One collective an iteration, of A x K numbers.

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
    logits = in_fp32(scores) / epsilon
    out = ~valid[..., None]
    for _ in range(iterations):
        per_rank = gather_stacked(logits.masked_fill(out, -torch.inf).logsumexp(dim=1))
        logits = logits - _over_groups(per_rank.logsumexp(dim=0), groups)[:, None]
        logits = logits.log_softmax(dim=2)
    return logits.exp().masked_fill(out, 0.0)


def _over_groups(masses: Tensor, groups: Sequence[int] | None) -> Tensor:
    """Log masses ``[A, K]`` of each view's group; 0 where a group has no row at all, so that nothing becomes NaN."""
    if groups is not None:
        number = torch.tensor(groups, device=masses.device)
        masses = torch.stack([masses[number == group].logsumexp(dim=0) for group in groups])
    return masses.masked_fill(masses == -torch.inf, 0.0)
