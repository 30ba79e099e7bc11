"""What every encoder of mmrep is: a backbone, a projection head, and the preprocessing that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmrep.batch import Input
from mmrep.encoders.batch_norm import GatheredBatchNorm
from mmrep.errors import ConfigError


class Encoder(nn.Module):
    """Base of the encoders.

    A subclass takes ``embed_dim`` first, so that a config names one width for any number of modalities, hands its other
    arguments to this constructor as ``settings``, so that a model folder can build it again with the same preprocessing, and
    passes on what it does not know (``**head``).

    Args:
        embed_dim: Width of the embedding space.
        feature_dim: Width of the backbone's output.
        settings: The subclass's own arguments, plain values.
        batch_norm: Whether the projection head standardises features over the global batch: see
            `mmrep.encoders.batch_norm.GatheredBatchNorm`.
        head_width: Width of a hidden layer of the projection head; 0 for a linear head.
        projection: Whether there is a projection head. Without one the embedding is what the backbone gives, as in
            pretrained models whose towers end in the embedding space already.
        lora: Adapters of low rank in place of training the backbone: see `mmrep.encoders.lora.add_adapters`.
        views: How many times the transform is drawn for a sample in training: each is a view of it.
    """

    kind: ClassVar[str]
    """What it takes: a kind of `mmrep.data.decode.KINDS`."""
    files: dict[str, str]
    """Name -> content of small text files that belong to the weights and are no settings: a tokenizer's vocabulary. A model
    folder and a checkpoint keep them, and a constructor that sets any takes them again as ``files``."""

    def __init__(
        self,
        embed_dim: int,
        feature_dim: int,
        settings: Mapping[str, Any],
        *,
        batch_norm: bool = False,
        head_width: int = 0,
        projection: bool = True,
        lora: dict[str, Any] | None = None,
        views: int = 1,
    ) -> None:
        super().__init__()
        if views < 1 or head_width < 0:
            raise ConfigError(f"views={views} must be at least 1, head_width={head_width} at least 0")
        if not projection and (feature_dim != embed_dim or batch_norm or head_width):
            raise ConfigError(
                f"without projection the backbone's {feature_dim} numbers are the embedding, and there is no head",
                fix=f"set embed_dim: {feature_dim}, and neither batch_norm nor head_width",
            )
        self.embed_dim, self.feature_dim, self.views, self.lora = embed_dim, feature_dim, views, lora
        self.settings = {**settings, "batch_norm": batch_norm, "head_width": head_width, "views": views}
        self.settings |= {} if projection else {"projection": False}
        self.settings |= {} if lora is None else {"lora": lora}
        self.files: dict[str, str] = {}
        self.head = _make_head(feature_dim, head_width, embed_dim, batch_norm) if projection else nn.Identity()

    def transform(self, train: bool) -> Callable[[Any], Any]:
        """A picklable function from one decoded sample to a compact tensor; random only if ``train``.

        It runs in the loader's workers. Conversion to float and normalisation belong to `features`, on the device.
        """
        raise NotImplementedError

    def empty(self, n: int) -> Tensor:
        """``n`` inputs ``[n, ...]`` that stand for nothing, of the shape and type that `transform` gives: zeros, where
        `features` is finite for them."""
        raise NotImplementedError

    def features(self, inputs: Tensor) -> Tensor:
        """The backbone: inputs ``[B, ...]`` to features ``[B, feature_dim]``."""
        raise NotImplementedError

    def layers(self) -> list[list[nn.Parameter]]:
        """The backbone's parameters in groups from input to output, for learning rates that decay with depth: here one."""
        return [[parameter for name, parameter in self.named_parameters() if not name.startswith("head.")]]

    def adapt(self) -> None:
        """Put the adapters of ``lora`` into the backbone; called once by `mmrep.model.MultimodalModel`."""
        if self.lora is not None:
            from mmrep.encoders.lora import add_adapters

            add_adapters(self, self.lora)
            self.lora = None

    def preprocess(self, train: bool) -> Callable[[Any], Input]:
        """What the loader does to a decoded sample: `transform`, and in training once for each view.

        Views come as a list with a tensor ``[V, ...]`` per resolution.
        """
        once = self.transform(train)
        return Views(once, self.views) if train and self.views > 1 else once

    def blank(self, train: bool) -> Input:
        """What stands for an absent sample: zeros in the shape that `preprocess` gives."""
        once = self.empty(1)[0]
        return [torch.stack([once] * self.views)] if train and self.views > 1 else once

    def forward(self, inputs: Input) -> Tensor:
        """Backbone and projection head.

        Args:
            inputs: ``[B, ...]``, or a list of views ``[B, V_r, ...]``, one tensor per resolution. The backbone runs once for
                each resolution, the head once for all views together.

        Returns:
            Embeddings ``[B, embed_dim]``, or ``[B, V, embed_dim]``, not normalised.
        """
        if isinstance(inputs, Tensor):
            embeddings: Tensor = self.head(self.features(inputs))
            return embeddings
        resolutions = [self.features(views.flatten(0, 1)).unflatten(0, views.shape[:2]) for views in inputs]
        features = torch.cat(resolutions, dim=1)
        together: Tensor = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return together


@dataclass(frozen=True)
class Views:
    """Draws a random transform several times."""

    transform: Callable[[Any], Tensor]
    count: int

    def __call__(self, sample: Any) -> Input:
        return [torch.stack([self.transform(sample) for _ in range(self.count)])]


def _make_head(feature_dim: int, hidden: int, embed_dim: int, batch_norm: bool) -> nn.Module:
    """Linear, or with one hidden layer; batch normalisation before each linear layer's input is used, where asked for."""
    if not hidden:
        linear = nn.Linear(feature_dim, embed_dim, bias=batch_norm)
        return nn.Sequential(GatheredBatchNorm(feature_dim), linear) if batch_norm else linear
    norm = GatheredBatchNorm(hidden) if batch_norm else nn.LayerNorm(hidden)
    return nn.Sequential(nn.Linear(feature_dim, hidden), norm, nn.ReLU(), nn.Linear(hidden, embed_dim))


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


def placed(views: Tensor, encoder: nn.Module, device: torch.device | str) -> Tensor:
    """An encoder's inputs on a device, floats in the type of its weights, as Lightning gives them to a run of any precision."""
    weight = next(encoder.parameters(), None)
    return views.to(device, weight.dtype if weight is not None and views.is_floating_point() else None)
