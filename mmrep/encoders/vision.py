"""Image encoders over the backbones of timm and torchvision, pretrained or not.

The backbones are used as they come. Many have BatchNorm, which in training mixes the samples of a rank's batch: the named
exception to mmrep's rule that norms do not. Frozen ones (see docs/encoders.md) use their stored statistics and mix nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.encoders.backbones import (
    Preprocessing,
    create_timm,
    create_torchvision,
    image_size_options,
    output_width,
    timm_preprocessing,
    torchvision_weights,
    without_classifier,
)
from mmrep.encoders.base import Standardize
from mmrep.encoders.crops import Crop, ImageEncoder
from mmrep.encoders.layers import layers_by_blocks, tower_layers
from mmrep.encoders.resize import RandomResizedCrop
from mmrep.errors import ConfigError
from mmrep.weights import load_weights, read_weights


class BackboneImageEncoder(ImageEncoder):
    """Base of the encoders over a whole image network without its classifier.

    Args:
        embed_dim: Width of the embedding space.
        backbone: Standardised pixels ``[B, 3, size, size]`` to features ``[B, width]``.
        width: Of the features.
        preprocessing: Of the backbone; stored with the weights.
        settings: The subclass's own arguments.
        crop_scale: Least and greatest share of a picture's area that training cuts out.
        resize: How training resizes: see `mmrep.encoders.resize.RandomResizedCrop`.
        crops: What training draws of each picture instead: see `mmrep.encoders.crops.Crop`.
        **head: See `mmrep.encoders.base.Encoder`.
    """

    def __init__(
        self,
        embed_dim: int,
        backbone: nn.Module,
        width: int,
        preprocessing: Preprocessing,
        settings: dict[str, Any],
        *,
        crop_scale: tuple[float, float],
        resize: str,
        crops: list[Crop] | None,
        **head: Any,
    ) -> None:
        settings |= {"preprocessing": asdict(preprocessing), "crop_scale": list(crop_scale), "resize": resize}
        super().__init__(embed_dim, width, settings, crops=crops, **head)
        self.preprocessing, size = preprocessing, preprocessing.size
        if odd := {crop.size for crop in self.crops} - {size}:
            raise ConfigError(f"{settings['architecture']} takes pictures of {size} pixels, not crops of {odd}")
        self.crop = RandomResizedCrop(size, (crop_scale[0], crop_scale[1]), resize)
        self.backbone = backbone
        self.standardize = Standardize(tuple(preprocessing.mean), tuple(preprocessing.std))

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return self.crop if train else self.preprocessing.transform()

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, 3, self.preprocessing.size, self.preprocessing.size, dtype=torch.uint8)

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.backbone(self.standardize(inputs))
        return features


class TimmImageEncoder(BackboneImageEncoder):
    """An image network of timm without its classifier: what timm calls the pre-logits.

    Preprocessing is what timm records for the architecture and its weights. A network with BatchNorm mixes the samples of a
    rank's batch in training, unless it is frozen.

    Args:
        embed_dim: Width of the embedding space.
        architecture: A name that ``timm.list_models()`` gives, with or without the tag of its weights:
            ``vit_small_patch16_224.augreg_in21k``.
        pretrained: True for timm's own weights, from its cache or the network; or the path of a ``.safetensors`` or
            weights-only ``.pth`` file with timm's names. Only read when a run begins: a model folder has its weights.
        image_size: Another size than timm's, in pixels a side, where the architecture allows it.
        crop_scale: Least and greatest share of a picture's area that training cuts out.
        resize: How training resizes: see `mmrep.encoders.resize.RandomResizedCrop`.
        crops: What training draws of each picture instead, at the backbone's own size: see `mmrep.encoders.crops.Crop`.
        preprocessing: As a model folder stores it.
        **head: ``projection``, ``batch_norm``, ``head_width``, ``lora``, ``views``: see `mmrep.encoders.base.Encoder`.

    Raises:
        ConfigError: On an unknown architecture, or one whose pictures are not square.
        CheckpointError: If the weights cannot be had, or do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        architecture: str = "resnet18",
        pretrained: bool | str = False,
        image_size: int | None = None,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        resize: str = "torch",
        crops: list[Crop] | None = None,
        preprocessing: dict[str, Any] | None = None,
        **head: Any,
    ) -> None:
        sizes = {} if image_size is None else image_size_options(architecture, (image_size, image_size))
        backbone = create_timm(architecture, pretrained, **sizes)
        prepared = Preprocessing(**preprocessing) if preprocessing else timm_preprocessing(backbone, image_size)
        settings = {"architecture": architecture, "image_size": image_size}
        super().__init__(
            embed_dim,
            backbone,
            output_width(backbone),
            prepared,
            settings,
            crop_scale=crop_scale,
            resize=resize,
            crops=crops,
            **head,
        )

    def layers(self) -> list[list[nn.Parameter]]:
        return tower_layers(self.backbone)


class TorchvisionImageEncoder(BackboneImageEncoder):
    """A classification network of torchvision without its last linear layer.

    A network with BatchNorm mixes the samples of a rank's batch in training, unless it is frozen.

    Args:
        embed_dim: Width of the embedding space.
        architecture: A name of ``torchvision.models.list_models(module=torchvision.models)``: ``resnet18``.
        pretrained: True for torchvision's default weights, from its cache or the network; or the path of a ``.safetensors``
            or weights-only ``.pth`` file with torchvision's names. Only read when a run begins.
        crop_scale, resize, crops, preprocessing, **head: See `TimmImageEncoder`.

    Raises:
        ConfigError: On an unknown architecture, or one that does not end in a linear layer.
        CheckpointError: If the weights cannot be had, or do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        architecture: str = "resnet18",
        pretrained: bool | str = False,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        resize: str = "torch",
        crops: list[Crop] | None = None,
        preprocessing: dict[str, Any] | None = None,
        **head: Any,
    ) -> None:
        backbone, prepared = create_torchvision(architecture)
        prepared = Preprocessing(**preprocessing) if preprocessing else prepared
        width, last = without_classifier(backbone, architecture)
        if pretrained:
            weights = torchvision_weights(architecture) if pretrained is True else read_weights(pretrained)
            kept = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{last}.")}
            load_weights(backbone, kept, where=architecture if pretrained is True else pretrained)
        settings = {"architecture": architecture}
        super().__init__(
            embed_dim, backbone, width, prepared, settings, crop_scale=crop_scale, resize=resize, crops=crops, **head
        )

    def layers(self) -> list[list[nn.Parameter]]:
        return layers_by_blocks(self.backbone)
