"""`Symile`: trains with `mmrep.losses.SymileLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrep.encoders import Encoder
from mmrep.losses import SymileLoss
from mmrep.modules.base import ContrastiveModule


class Symile(ContrastiveModule):
    """Contrasts whole tuples of any number of modalities.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        negatives: ``shuffled`` or ``all``: see `mmrep.losses.SymileLoss`.
        init_logit_scale: Log of the initial scale; by default fitted to the width and the number of modalities.
        negatives_seed: Of the shuffles.
        missing: ``drop`` or ``placeholder``: what becomes of samples that lack a modality.
        pairwise_weight: Weight of an added pairwise CLIP term, by which one modality can find one other.
        **training: See `ContrastiveModule`.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        negatives: str = "shuffled",
        init_logit_scale: float | None = None,
        negatives_seed: int = 0,
        missing: str = "drop",
        pairwise_weight: float = 0.0,
        **training: Any,
    ) -> None:
        def make_loss(modalities: list[str], embed_dim: int) -> SymileLoss:
            return SymileLoss(
                negatives=negatives,
                init_logit_scale=init_logit_scale,
                seed=negatives_seed,
                missing=missing,
                pairwise_weight=pairwise_weight,
                modalities=modalities,
                embed_dim=embed_dim,
            )

        super().__init__(encoders, make_loss, **training)
