"""Encoder of plain vectors: tables of values, or features that another model computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmrep.encoders.base import Encoder
from mmrep.errors import DataError


@dataclass(frozen=True)
class FixedVector:
    """An array of ``size`` numbers, in any shape, to float32 ``[size]``. NaN stands for a value that was not measured."""

    size: int

    def __call__(self, array: np.ndarray) -> Tensor:
        if array.size != self.size:
            raise DataError(
                f"an array of {array.size} numbers where {self.size} are expected", fix="set size in the config"
            )
        return torch.from_numpy(array.astype(np.float32).ravel())


class FeaturesEncoder(Encoder):
    """A perceptron with one hidden layer over a vector; each value comes with a bit that says whether it is known.

    Args:
        embed_dim: Width of the embedding space.
        size: How many numbers a sample has.
        width: Of the hidden layer.
        **head: ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    kind = "array"

    def __init__(self, embed_dim: int, size: int = 16, width: int = 128, **head: Any) -> None:
        super().__init__(embed_dim, width, {"size": size, "width": width}, **head)
        self.size = size
        self.backbone = nn.Sequential(
            nn.Linear(2 * size, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width)
        )

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return FixedVector(self.size)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.size)

    def features(self, inputs: Tensor) -> Tensor:
        known = ~inputs.isnan()
        features: Tensor = self.backbone(torch.cat([inputs.nan_to_num(), known.to(inputs.dtype)], dim=1))
        return features
