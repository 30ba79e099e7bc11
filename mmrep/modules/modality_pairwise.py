"""`ModalityPairwise`: trains with `mmrep.losses.ModalityPairwiseLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrep.encoders import Encoder
from mmrep.losses import ModalityPairwiseLoss
from mmrep.losses.weights import Matrix
from mmrep.modules.base import ContrastiveModule


class ModalityPairwise(ContrastiveModule):
    """Contrasts every ordered pair of modalities across temporal or augmented views.

    Args:
        encoders: Modality -> encoder. Views come from their ``views`` or ``crops``.
        positives: ``aligned``, ``other_view`` or ``all``.
        exclude_aligned: Whether the same view is left out of the negatives.
        legacy_scale: What the loss is multiplied by; .5 as the paper's code.
        init_temperature: The logit scale is its inverse.
        learn_temperature: Whether the logit scale is learned.
        max_logit_scale: Bound of the logit scale; null for none.
        weights: M x M, of ordered pairs; by default all are 1.
        **training: See `ContrastiveModule`.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        positives: str = "other_view",
        exclude_aligned: bool = False,
        legacy_scale: float = 1.0,
        init_temperature: float = 0.07,
        learn_temperature: bool = False,
        max_logit_scale: float | None = 100.0,
        weights: Matrix | None = None,
        **training: Any,
    ) -> None:
        def make_loss(modalities: list[str], embed_dim: int) -> ModalityPairwiseLoss:
            return ModalityPairwiseLoss(
                positives=positives,
                exclude_aligned=exclude_aligned,
                legacy_scale=legacy_scale,
                init_temperature=init_temperature,
                learn_temperature=learn_temperature,
                max_logit_scale=max_logit_scale,
                weights=weights,
                modalities=modalities,
            )

        super().__init__(encoders, make_loss, **training)
