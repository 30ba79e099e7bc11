"""`HigherOrder`: trains with one of Symile's rivals: GRAM, TRIANGLE, ConFu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrep.encoders import Encoder
from mmrep.errors import ConfigError, check_choice
from mmrep.losses import ConFuLoss, GRAMLoss, Loss, TriangleLoss
from mmrep.modules.base import ContrastiveModule

OBJECTIVES = ("gram", "triangle", "confu")


class HigherOrder(ContrastiveModule):
    """The published ways to contrast three modalities or more at once, other than Symile's product.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        objective: ``gram`` (volume), ``triangle`` (area, three modalities) or ``confu`` (fused pairs plus pairs).
        init_temperature: The logit scale starts at its inverse.
        learn_temperature: Whether the logit scale is learned; by default as published: not for confu.
        max_logit_scale: Bound of the logit scale; null for none.
        anchor: Of gram and triangle: whose rows are contrasted; null takes each modality in turn.
        label_smoothing: Of gram and triangle, by default .1.
        epsilon: Of gram and triangle: keeps the gradient of the root finite, by default 1e-6.
        root: Of triangle: whether the size is the area itself, and not twice its square.
        fusion_weight: Of confu: weight of the fused terms against the pairs, by default .5.
        fusion_width: Of confu: width of the fusion's hidden layer, by default 512.
        **training: See `ContrastiveModule`.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        objective: str = "gram",
        init_temperature: float = 0.07,
        learn_temperature: bool | None = None,
        max_logit_scale: float | None = 100.0,
        anchor: str | None = None,
        label_smoothing: float | None = None,
        epsilon: float | None = None,
        root: bool | None = None,
        fusion_weight: float | None = None,
        fusion_width: int | None = None,
        **training: Any,
    ) -> None:
        check_choice("objective", objective, OBJECTIVES)
        geometric = {"anchor": anchor, "label_smoothing": label_smoothing, "epsilon": epsilon}
        own: dict[str, dict[str, Any]] = {
            "gram": geometric,
            "triangle": {**geometric, "root": root},
            "confu": {"fusion_weight": fusion_weight, "fusion_width": fusion_width},
        }
        given = {name: value for options in own.values() for name, value in options.items() if value is not None}
        if foreign := [name for name in given if name not in own[objective]]:
            raise ConfigError(f"{objective} has no {', '.join(foreign)}", fix=f"it has {', '.join(own[objective])}")
        given["learn_temperature"] = objective != "confu" if learn_temperature is None else learn_temperature
        given |= {"init_temperature": init_temperature, "max_logit_scale": max_logit_scale}

        def make_loss(modalities: list[str], embed_dim: int) -> Loss:
            if objective == "confu":
                return ConFuLoss(modalities=modalities, embed_dim=embed_dim, **given)
            if objective == "triangle":
                return TriangleLoss(modalities=modalities, **given)
            return GRAMLoss(modalities=modalities, **given)

        super().__init__(encoders, make_loss, **training)
