"""Image encoders: a small one that trains on a CPU, and open_clip's towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from mmrep.encoders.base import Standardize
from mmrep.encoders.crops import Crop, ImageEncoder
from mmrep.encoders.layers import tower_layers
from mmrep.encoders.open_clip import find_source, half_config, image_tower, load_pretrained
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
    """The image tower of a model of open_clip's: its own, timm's, with random or pretrained weights.

    Pictures are prepared as the weights want them, by open_clip's own transform, only that they stay uint8 until they are on
    the device.

    Args:
        embed_dim: Width of the embedding space; a linear head leads from the tower's output to it, and with ``projection:
            false`` the tower's output is the embedding.
        architecture: A name that ``open_clip.list_models()`` gives, by default ViT-B-32; or a config as under ``model_cfg``.
        pretrained: A tag of the architecture, ``local-dir:DIR`` or ``hf-hub:ORG/REPO``; null for random weights. A model that
            is loaded again does not need it.
        preprocess: What replaces single keys of open_clip's ``preprocess_cfg``.
        crops: What training draws of each picture instead, at the tower's own resolution.
        resize: How training resizes: ``torch``, or the faster ``opencv``; see `mmrep.encoders.resize.RandomResizedCrop`.
        **head: ``batch_norm``, ``head_width``, ``projection``, ``lora``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    def __init__(
        self,
        embed_dim: int,
        architecture: str | dict[str, Any] | None = None,
        pretrained: str | None = None,
        preprocess: dict[str, Any] | None = None,
        crops: list[Crop] | None = None,
        resize: str = "torch",
        **head: Any,
    ) -> None:
        source = find_source(architecture, pretrained, preprocess)
        preprocessing, model_config = source.preprocess, source.model
        settings: dict[str, Any] = {"architecture": architecture or "ViT-B-32", "resize": resize}
        if pretrained is not None or preprocess is not None or not isinstance(architecture, str | None):
            settings |= {"architecture": half_config(source.model, "vision_cfg"), "preprocess": source.preprocess}
        super().__init__(embed_dim, source.model["embed_dim"], settings, crops=crops, **head)
        self.preprocessing, self.model_config = preprocessing, model_config
        self.size = preprocessing["size"]
        if odd := {crop.size for crop in self.crops} - {self.size}:
            raise ConfigError(f"{source.name} takes pictures of {self.size} pixels, not crops of {odd}")
        self.tower = image_tower(source.model)
        if pretrained is not None:
            load_pretrained(self.tower, source, "visual")
        self.standardize = Standardize(tuple(self.preprocessing["mean"]), tuple(self.preprocessing["std"]))
        self.resize = resize

    def transform(self, train: bool) -> Callable[[Any], Any]:
        if train:
            if not isinstance(self.size, int):
                raise ConfigError(f"training crops are square, and the tower wants {self.size}")
            return RandomResizedCrop(self.size, backend=self.resize)
        from open_clip.transform import PreprocessCfg, image_transform_v2

        steps = image_transform_v2(PreprocessCfg(**self.preprocessing), is_train=False).transforms
        transform: Callable[[Any], Tensor] = v2.Compose([*steps[:-2], v2.PILToTensor()])  # without ToTensor, Normalize
        return transform

    def empty(self, n: int) -> Tensor:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        return torch.zeros(n, 3, height, width, dtype=torch.uint8)

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower(self.standardize(inputs))
        return features

    def layers(self) -> list[list[nn.Parameter]]:
        return tower_layers(self.tower)
