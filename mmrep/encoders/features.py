"""Encoders of plain vectors: their common base, and the one for features that another model computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.encoders.base import Encoder
from mmrep.errors import ConfigError, DataError


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


class VectorEncoder(Encoder):
    """Base of the encoders whose input is ``size`` numbers.

    Args:
        embed_dim, feature_dim: See `mmrep.encoders.base.Encoder`.
        size: How many numbers a sample has.
        settings: The subclass's own arguments, ``size`` apart.
        **head: See `mmrep.encoders.base.Encoder`.
    """

    kind = "array"

    def __init__(self, embed_dim: int, feature_dim: int, size: int, settings: dict[str, Any], **head: Any) -> None:
        if size < 1:
            raise ConfigError(f"size={size} must be at least 1")
        super().__init__(embed_dim, feature_dim, {"size": size, **settings}, **head)
        self.size = size

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return FixedVector(self.size)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.size)


class FeaturesEncoder(VectorEncoder):
    """Features that another model computed: a perceptron over them, or the head alone.

    With hidden layers each value comes with a bit that says whether it is known, as in `mmrep.encoders.TabularEncoder`.
    Without, the vector itself goes to the head, which is how frozen towers are bound cheaply: their outputs are computed
    once and stored as ``.npy`` members.

    Args:
        embed_dim: Width of the embedding space.
        size: How many numbers a sample has.
        width: Of the hidden layers and of the output.
        layers: Hidden layers; 0 leaves the vectors as they are, a value that is not known being 0.
        unit_length: Whether vectors are scaled to length 1 first.
        **head: ``projection``, ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    def __init__(
        self,
        embed_dim: int,
        size: int = 16,
        width: int = 128,
        layers: int = 1,
        unit_length: bool = False,
        **head: Any,
    ) -> None:
        settings: dict[str, Any] = {"width": width}
        settings |= {} if layers == 1 else {"layers": layers}
        settings |= {"unit_length": True} if unit_length else {}
        super().__init__(embed_dim, width if layers else size, size, settings, **head)
        self.unit_length = unit_length
        self.backbone = perceptron(2 * size, width, layers) if layers else nn.Identity()

    def features(self, inputs: Tensor) -> Tensor:
        known = inputs.isfinite()
        values = inputs.masked_fill(~known, 0.0)
        if self.unit_length:
            values = F.normalize(values, dim=1)
        if isinstance(self.backbone, nn.Identity):
            return values
        features: Tensor = self.backbone(torch.cat([values, known.to(values.dtype)], dim=1))
        return features


def perceptron(before: int, width: int, layers: int) -> nn.Sequential:
    """Hidden layers of ``width`` with LayerNorm and GELU, and a linear output of ``width``.

    Raises:
        ConfigError: If there is no hidden layer.
    """
    if layers < 1:
        raise ConfigError(f"layers={layers} must be at least 1")
    hidden: list[nn.Module] = []
    for number in range(layers):
        hidden += [nn.Linear(width if number else before, width), nn.LayerNorm(width), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(width, width))
