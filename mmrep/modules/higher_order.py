"""`HigherOrder`: trains with one of Symile's rivals: GRAM, TRIANGLE, ConFu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrep.encoders import Encoder
from mmrep.errors import ConfigError, did_you_mean
from mmrep.losses import ConFuLoss, GRAMLoss, Loss, TriangleLoss
from mmrep.modules.base import ContrastiveModule

OBJECTIVES = ("gram", "triangle", "confu")


class HigherOrder(ContrastiveModule):
    """The published ways to contrast three modalities or more at once, other than Symile's product.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        objective: ``gram`` (volume), ``triangle`` (area, three modalities) or ``confu`` (fused pairs plus pairs).
        anchor: Of gram and triangle: whose rows are contrasted; null takes each modality in turn.
        init_temperature: The logit scale starts at its inverse.
        learn_temperature: Whether the logit scale is learned; by default as published: not for confu.
        max_logit_scale: Bound of the logit scale; null for none.
        label_smoothing: Of gram and triangle.
        root: Of triangle: whether the size is the area itself, and not twice its square.
        fusion_weight: Of confu: weight of the fused terms against the pairs.
        fusion_width: Of confu: width of the fusion's hidden layer.
        **training: See `ContrastiveModule`.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        objective: str = "gram",
        anchor: str | None = None,
        init_temperature: float = 0.07,
        learn_temperature: bool | None = None,
        max_logit_scale: float | None = 100.0,
        label_smoothing: float = 0.1,
        root: bool = False,
        fusion_weight: float = 0.5,
        fusion_width: int = 512,
        **training: Any,
    ) -> None:
        if objective not in OBJECTIVES:
            raise ConfigError(f"objective={objective!r}", fix=did_you_mean(objective, OBJECTIVES))
        if anchor is not None and objective == "confu":
            raise ConfigError("confu has no anchor: it fuses towards each modality", fix="leave anchor out")

        def make_loss(modalities: list[str], embed_dim: int) -> Loss:
            common: dict[str, Any] = {
                "modalities": modalities,
                "init_temperature": init_temperature,
                "max_logit_scale": max_logit_scale,
                "learn_temperature": objective != "confu" if learn_temperature is None else learn_temperature,
            }
            if objective == "confu":
                fusion: dict[str, Any] = {"fusion_weight": fusion_weight, "fusion_width": fusion_width}
                return ConFuLoss(embed_dim=embed_dim, **fusion, **common)
            if objective == "triangle":
                return TriangleLoss(anchor=anchor, label_smoothing=label_smoothing, root=root, **common)
            return GRAMLoss(anchor=anchor, label_smoothing=label_smoothing, **common)

        super().__init__(encoders, make_loss, **training)
