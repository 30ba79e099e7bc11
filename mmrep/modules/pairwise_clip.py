"""`PairwiseCLIP`: trains with `mmrep.losses.PairwiseCLIPLoss`."""

from __future__ import annotations

from collections.abc import Callable

from mmrep.encoders import Encoder
from mmrep.losses import PairwiseCLIPLoss
from mmrep.modules.base import ContrastiveModule


class PairwiseCLIP(ContrastiveModule):
    """CLIP between every two of any number of modalities.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        embed_dim: Width of the embedding space, given to every encoder.
        normalize: ``l2`` or ``layernorm``: see `mmrep.model.MultimodalModel`.
        share: Modality -> the modality whose encoder it uses too.
        init_temperature: The logit scale starts at its inverse.
        learn_temperature: Whether the logit scale is learned.
        reduction: ``mean`` or ``sum`` over the pairs.
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
        init_temperature: float = 0.07,
        learn_temperature: bool = True,
        reduction: str = "mean",
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
    ) -> None:
        loss = PairwiseCLIPLoss(
            init_temperature=init_temperature, learn_temperature=learn_temperature, reduction=reduction
        )
        super().__init__(
            encoders,
            loss,
            embed_dim=embed_dim,
            normalize=normalize,
            share=share,
            lr=lr,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
        )
