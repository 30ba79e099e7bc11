"""`PairwiseCLIP`: trains with `mmrep.losses.PairwiseCLIPLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrep.encoders import Encoder
from mmrep.losses import PairwiseCLIPLoss
from mmrep.losses.pairs import PairSpec
from mmrep.modules.base import ContrastiveModule


class PairwiseCLIP(ContrastiveModule):
    """CLIP, or SigLIP, between pairs of any number of modalities.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        pairs: ``all``, a list as ``[image-text, audio-text]``, or weights as ``{image-text: 1.0, audio-text: 0.5}``.
        anchor: Only pairs with this modality.
        reduction: ``mean`` or ``sum`` over the pairs.
        form: ``softmax`` (CLIP) or ``sigmoid`` (SigLIP).
        init_temperature: The logit scale starts at its inverse; by default .07, and .1 in the sigmoid form.
        learn_temperature: Whether the logit scale is learned.
        max_logit_scale: Bound of the logit scale; null for none.
        scale_per_pair: Whether each pair has its own logit scale and bias.
        init_bias: Of the sigmoid form.
        **training: See `ContrastiveModule`.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        pairs: PairSpec = "all",
        anchor: str | None = None,
        reduction: str = "mean",
        form: str = "softmax",
        init_temperature: float | None = None,
        learn_temperature: bool = True,
        max_logit_scale: float | None = 100.0,
        scale_per_pair: bool = False,
        init_bias: float = -10.0,
        **training: Any,
    ) -> None:
        def make_loss(modalities: list[str], embed_dim: int) -> PairwiseCLIPLoss:
            return PairwiseCLIPLoss(
                pairs=pairs,
                anchor=anchor,
                reduction=reduction,
                form=form,
                init_temperature=init_temperature,
                learn_temperature=learn_temperature,
                max_logit_scale=max_logit_scale,
                scale_per_pair=scale_per_pair,
                init_bias=init_bias,
                modalities=modalities,
            )

        super().__init__(encoders, make_loss, **training)
