"""Image encoders: a small one that trains on a CPU, and open_clip's towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from mmrep.encoders.base import Standardize
from mmrep.encoders.crops import Crop, ImageEncoder
from mmrep.encoders.open_clip import create_towers, preprocessing
from mmrep.encoders.resize import RandomResizedCrop
from mmrep.errors import ConfigError


class ConvImageEncoder(ImageEncoder):
    """A few strided convolutions with GroupNorm, averaged over the picture: for small pictures and CPUs.

    Args:
        embed_dim: Width of the embedding space.
        image_size: Pictures are resized to this many pixels a side.
        width: Channels after the first convolution; they double with each of the four.
        augment: Whether training moves, tilts, scales and recolours the picture.
        crops: What training draws of each picture instead, one entry per resolution: see `mmrep.encoders.crops.Crop`.
        **head: ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    def __init__(
        self,
        embed_dim: int,
        image_size: int = 32,
        width: int = 32,
        augment: bool = True,
        crops: list[Crop] | None = None,
        **head: Any,
    ) -> None:
        settings = {"image_size": image_size, "width": width, "augment": augment}
        super().__init__(embed_dim, 8 * width, settings, crops=crops, **head)
        self.image_size, self.augment = image_size, augment
        self.standardize = Standardize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        layers: list[nn.Module] = []
        for level, channels in enumerate(width * 2**level for level in range(4)):
            before = channels // 2 if level else 3
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels), nn.GELU()]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def transform(self, train: bool) -> Callable[[Any], Any]:
        size, bilinear = [self.image_size, self.image_size], InterpolationMode.BILINEAR
        if not (train and self.augment):
            plain: Callable[[Any], Tensor] = v2.Compose([v2.Resize(size, antialias=True), v2.PILToTensor()])
            return plain
        augmented: Callable[[Any], Tensor] = v2.Compose(
            [
                v2.Resize(size, antialias=True),
                v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.4),
                v2.RandomAffine(
                    degrees=12, translate=(0.08, 0.08), scale=(0.85, 1.2), fill=255, interpolation=bilinear
                ),
                v2.PILToTensor(),
            ]
        )
        return augmented

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, 3, self.image_size, self.image_size, dtype=torch.uint8)

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.backbone(self.standardize(inputs))
        return features


class OpenClipImageEncoder(ImageEncoder):
    """The image tower of an open_clip architecture, with random weights.

    Pictures are prepared as open_clip prepares them, only that they stay uint8 until they are on the device.

    Args:
        embed_dim: Width of the embedding space; a linear head leads from the tower's output to it.
        architecture: A name that ``open_clip.list_models()`` gives.
        crops: What training draws of each picture instead, at the tower's own resolution.
        resize: How training resizes: ``torch``, or the faster ``opencv``; see `mmrep.encoders.resize.RandomResizedCrop`.
        **head: ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    def __init__(
        self,
        embed_dim: int,
        architecture: str = "ViT-B-32",
        crops: list[Crop] | None = None,
        resize: str = "torch",
        **head: Any,
    ) -> None:
        model = create_towers(architecture)
        self.preprocessing = preprocessing(model.visual)
        settings = {"architecture": architecture, "resize": resize}
        super().__init__(embed_dim, self.preprocessing.width, settings, crops=crops, **head)
        self.crop = RandomResizedCrop(self.preprocessing.size, backend=resize)
        if odd := {crop.size for crop in self.crops} - {self.preprocessing.size}:
            raise ConfigError(f"{architecture} takes pictures of {self.preprocessing.size} pixels, not crops of {odd}")
        self.tower = model.visual
        self.standardize = Standardize(self.preprocessing.mean, self.preprocessing.std)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        if train:
            return self.crop
        size = self.preprocessing.size
        resized = v2.Resize(size, interpolation=InterpolationMode.BICUBIC)
        transform: Callable[[Any], Tensor] = v2.Compose([resized, v2.CenterCrop(size), v2.PILToTensor()])
        return transform

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, 3, self.preprocessing.size, self.preprocessing.size, dtype=torch.uint8)

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower(self.standardize(inputs))
        return features
