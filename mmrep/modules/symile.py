"""`Symile`: trains with `mmrep.losses.SymileLoss`."""

from __future__ import annotations

from collections.abc import Callable

from mmrep.encoders import Encoder
from mmrep.losses import SymileLoss
from mmrep.modules.base import ContrastiveModule


class Symile(ContrastiveModule):
    """Contrasts whole tuples of any number of modalities.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        embed_dim: Width of the embedding space, given to every encoder.
        normalize: ``l2`` or ``layernorm``: see `mmrep.model.MultimodalModel`.
        share: Modality -> the modality whose encoder it uses too.
        negatives: ``shuffled`` or ``all``: see `mmrep.losses.SymileLoss`.
        init_logit_scale: Log of the initial scale; by default fitted to the width and the number of modalities.
        negatives_seed: Of the shuffles.
        lr: Peak learning rate.
        weight_decay: Of weight matrices; biases, norms and the logit scale are not decayed.
        warmup_steps: Steps of linear warm-up, before the cosine.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        embed_dim: int = 128,
        normalize: str = "l2",
        share: dict[str, str] | None = None,
        negatives: str = "shuffled",
        init_logit_scale: float | None = None,
        negatives_seed: int = 0,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
    ) -> None:
        super().__init__(
            encoders,
            SymileLoss(negatives=negatives, init_logit_scale=init_logit_scale, seed=negatives_seed),
            embed_dim=embed_dim,
            normalize=normalize,
            share=share,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
        )
