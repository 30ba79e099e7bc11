"""GRAM: the volume of the parallelotope that a tuple of rows spans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrep.errors import ConfigError
from mmrep.losses.geometric import GeometricLoss


class GRAMLoss(GeometricLoss):
    r"""Volume contrast (Cicchetti et al., ICLR 2025): ``V = sqrt(det G)``, G the Gram matrix of the anchor and the others.

    The published square root has an infinite gradient where rows are dependent, which is where training leads: one aligned
    pair makes every gradient of its tuple NaN. Here ``V = sqrt(max(0, det(G + eps I)) + eps)``, whose gradient is finite
    everywhere; it differs from the published volume by at most ``eps / 2V`` and the like. The determinant is that of the
    others' Gram matrix times the squared distance of the anchor from their span (Schur complement): memory K x K x (M-1).

    Args:
        anchor: See `GeometricLoss`. The paper's is text.
        init_temperature, learn_temperature, max_logit_scale: Of the logit scale.
        label_smoothing: As published, .1.
        epsilon: Keeps the gradient finite.
        modalities: See `Loss`.
    """

    def __init__(
        self,
        *,
        anchor: str | None = None,
        init_temperature: float = 0.07,
        learn_temperature: bool = True,
        max_logit_scale: float | None = 100.0,
        label_smoothing: float = 0.1,
        epsilon: float = 1e-6,
        modalities: Sequence[str] | None = None,
    ) -> None:
        if not epsilon > 0:
            raise ConfigError(f"epsilon={epsilon} must be positive")
        super().__init__(
            anchor=anchor,
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            label_smoothing=label_smoothing,
            modalities=modalities,
            epsilon=epsilon,
        )
        self.epsilon = epsilon

    def size(self, anchor: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Volumes ``[A, C]``: see `GeometricLoss.size`."""
        # In float64 what is linear in the number of tuples: near-dependent rows need it, and K x K products cost far more.
        stacked = torch.stack(list(others), dim=1).double()
        ridge = self.epsilon * torch.eye(len(others), dtype=stacked.dtype, device=stacked.device)
        factor = torch.linalg.cholesky(stacked @ stacked.mT + ridge)
        basis = torch.linalg.solve_triangular(factor, stacked, upper=False).to(anchor.dtype)
        within_span = (anchor @ basis.flatten(0, 1).T).square().unflatten(1, (-1, len(others))).sum(dim=2)
        outside = ((anchor * anchor).sum(dim=1, keepdim=True) + self.epsilon - within_span).clamp(min=0)
        base = factor.diagonal(dim1=1, dim2=2).square().prod(dim=1).to(anchor.dtype)
        volume: Tensor = (outside * base + self.epsilon).sqrt()
        return volume
