"""What every encoder of mmrep is: a backbone, a projection head, and the preprocessing that belongs to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmrep.batch import Input
from mmrep.encoders.batch_norm import GatheredBatchNorm


class Encoder(nn.Module):
    """Base of the encoders.

    A subclass takes ``embed_dim`` first, so that a config names one width for any number of modalities, and gives its
    other arguments to this constructor, so that a model folder can build it again with the same preprocessing.

    Args:
        embed_dim: Width of the embedding space.
        feature_dim: Width of the backbone's output.
        batch_norm: Whether the projection head standardises features over the global batch: see
            `mmrep.encoders.batch_norm.GatheredBatchNorm`.
        **settings: The subclass's other arguments, plain values.
    """

    kind: ClassVar[str]
    """What it takes: a kind of `mmrep.data.index.KINDS`."""

    def __init__(self, embed_dim: int, feature_dim: int, *, batch_norm: bool = False, **settings: Any) -> None:
        super().__init__()
        self.embed_dim, self.feature_dim, self.settings = embed_dim, feature_dim, {**settings, "batch_norm": batch_norm}
        self.head: nn.Module = nn.Linear(feature_dim, embed_dim, bias=batch_norm)
        if batch_norm:
            self.head = nn.Sequential(GatheredBatchNorm(feature_dim), self.head)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        """A picklable function from one decoded sample to a compact tensor (`Input`); random only if ``train``.

        It runs in the loader's workers. Conversion to float and normalisation belong to `features`, on the device.
        """
        raise NotImplementedError

    def empty(self, n: int) -> Input:
        """``n`` inputs of zeros, of the shape and type that `transform` gives: what stands for absent samples."""
        raise NotImplementedError

    def features(self, inputs: Tensor) -> Tensor:
        """The backbone: inputs ``[B, ...]`` to features ``[B, feature_dim]``."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """Backbone and projection head: inputs ``[B, ...]`` to embeddings ``[B, embed_dim]``, not normalised."""
        embeddings: Tensor = self.head(self.features(inputs))
        return embeddings


class Standardize(nn.Module):
    """uint8 pixels ``[B, C, H, W]`` to ``(x / 255 - mean) / std`` in the model's float type, on its device."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
