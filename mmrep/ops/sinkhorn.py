"""Sinkhorn-Knopp: from scores to codes that use every prototype equally, over the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrep.ops.gather import logsumexp_over_ranks
from mmrep.ops.multilinear import in_fp32

SAFE_RANGE = 50.0
"""Largest difference of two logits whose exponentials, times scaling vectors, stay in fp32: ``1.5 x 50 + log n < 87``."""

CPU_BLOCK = 2**19
"""Logits that a CPU works on at one time: several passes over them stay in its cache."""


@torch.no_grad()
def sinkhorn(
    scores: Tensor, valid: Tensor, *, epsilon: float, iterations: int, groups: Sequence[int] | None = None
) -> Tensor:
    """Soft codes of A views by Sinkhorn-Knopp (Caron et al. 2020, equation 3 and appendix A).

    An iteration gives every prototype the same mass over the rows of all ranks, then every row the mass 1. The usual division
    by the number of rows, which goes wrong as soon as ranks have unequal numbers of them, is not needed: it cancels. The
    matrix stays as it is, and two vectors of scales are found (Cuturi 2013), by products with exponentials where the range
    of this rank's logits allows it, and else by log-sum-exps, so that no ``epsilon`` overflows. The ranks exchange logarithms
    in either case, a maximum and a sum an iteration, of A x K numbers each.

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
    scaling = _choose(in_fp32(scores), valid, epsilon)
    columns = _shares(scaling.masses(None), groups)
    for _ in range(iterations - 1):
        columns = _shares(scaling.masses(columns), groups)
    return scaling.codes(columns)


def _choose(scores: Tensor, valid: Tensor, epsilon: float) -> _Exponentials | _Logarithms:
    if scores.numel():
        lowest, highest = torch.aminmax(scores)
        if (highest - lowest) / epsilon <= SAFE_RANGE:
            return _Exponentials(scores, valid, epsilon, (lowest + highest) / (2 * epsilon))
    return _Logarithms(scores, valid, epsilon)


class _Exponentials:
    """Scales by products with ``exp(scores / epsilon - centre)``, a block of rows at a time."""

    def __init__(self, scores: Tensor, valid: Tensor, epsilon: float, centre: Tensor) -> None:
        self.exponentials, self.valid, self.centre = torch.empty_like(scores), valid.to(scores.dtype), centre
        block = max(1, CPU_BLOCK // scores.shape[2]) if scores.device.type == "cpu" else scores.shape[1]
        self.blocks = [list(part.split(block)) for part in self.exponentials]
        self.masks = [mask.split(block) for mask in self.valid]
        for source, blocks in zip(scores, self.blocks, strict=True):
            for part, to in zip(source.split(block), blocks, strict=True):
                torch.add(-centre, part, alpha=1 / epsilon, out=to).exp_()

    def masses(self, columns: Tensor | None) -> Tensor:
        """Log mass of each prototype ``[A, K]`` over this rank's rows, each of mass 1 under the scales of columns.

        Without scales, rows are as they come.
        """
        offset = -self.centre if columns is None else columns.amax(dim=1, keepdim=True)
        totals = self.exponentials.new_zeros(len(self.blocks), self.exponentials.shape[2])
        for view, total in enumerate(totals):
            scale = None if columns is None else (columns[view] - columns[view].amax()).exp()
            for block, mask in zip(self.blocks[view], self.masks[view], strict=True):
                total.addmv_(block.T, mask if scale is None else mask / (block @ scale))
        return totals.log_() - offset

    def codes(self, columns: Tensor) -> Tensor:
        """``[A, n, K]`` under the scales of columns, in the place of the exponentials."""
        scales = (columns - columns.amax(dim=1, keepdim=True)).exp()
        for scale, blocks, masks in zip(scales, self.blocks, self.masks, strict=True):
            for block, mask in zip(blocks, masks, strict=True):
                block.mul_(scale)
                block.mul_((mask / block.sum(dim=1))[:, None])
        return self.exponentials


class _Logarithms:
    """The same by log-sum-exps."""

    def __init__(self, scores: Tensor, valid: Tensor, epsilon: float) -> None:
        self.logits, self.valid = scores / epsilon, valid

    def masses(self, columns: Tensor | None) -> Tensor:
        """See `_Exponentials.masses`."""
        rows = torch.zeros_like(self.valid, dtype=self.logits.dtype)
        if columns is not None:
            rows = -(self.logits + columns[:, None]).logsumexp(dim=2)
        return (self.logits + rows.masked_fill(~self.valid, -torch.inf)[..., None]).logsumexp(dim=1)

    def codes(self, columns: Tensor) -> Tensor:
        """See `_Exponentials.codes`."""
        return (self.logits + columns[:, None]).softmax(dim=2) * self.valid[..., None]


def _shares(masses: Tensor, groups: Sequence[int] | None) -> Tensor:
    """Log scales of the columns ``[A, K]`` that give every prototype its share over all ranks, from this rank's log masses.

    0 where a group has no row at all, so that nothing becomes NaN.
    """
    (together,) = logsumexp_over_ranks([masses.flatten()])
    masses = together.view_as(masses)
    if groups is not None:
        number = torch.tensor(groups, device=masses.device)
        masses = torch.stack([masses[number == group].logsumexp(dim=0) for group in groups])
    return -masses.masked_fill(masses == -torch.inf, 0.0)
