"""Multi-crop: several random crops of a picture, at one resolution or more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from mmrep.batch import Input
from mmrep.encoders.base import Encoder
from mmrep.errors import ConfigError

BLUR_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class Crop:
    """Crops of one resolution, with SwAV's augmentations (Caron et al. 2020, section 4.1 and appendix).

    Args:
        count: How many of them a sample gives.
        size: In pixels a side.
        scale: Least and greatest share of the picture's area.
        flip: Chance of a mirror image.
        jitter: Chance that brightness, contrast, saturation (by .8) and hue (by .2) change.
        grey: Chance that colour is lost.
        blur: Chance of a Gaussian blur.
    """

    count: int
    size: int
    scale: tuple[float, float] = (0.14, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.5

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(
                f"a crop of count={self.count}, size={self.size}, scale={list(self.scale)}",
                fix="count and size are at least 1, scale two shares in (0, 1], the smaller first",
            )

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """One random crop: a picture to uint8 ``[3, size, size]``."""
        sides = max(3, self.size // 10 | 1)
        steps = [
            v2.RandomResizedCrop(self.size, scale=self.scale, antialias=True),
            v2.RandomHorizontalFlip(self.flip),
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], self.jitter),
            v2.RandomGrayscale(self.grey),
            v2.PILToTensor(),
            v2.RandomApply([v2.GaussianBlur(sides, BLUR_SIGMA)], self.blur),
        ]
        composed: Callable[[Image.Image], Tensor] = v2.Compose(steps)
        return composed


class MultiCrop:
    """A picture to a list of crops uint8 ``[count, 3, size, size]``, one tensor per resolution.

    Args:
        crops: What is drawn, one entry per resolution.
    """

    def __init__(self, crops: Sequence[Crop]) -> None:
        self.draws = [(crop.count, crop.transform()) for crop in crops]

    def __call__(self, picture: Image.Image) -> Input:
        return [torch.stack([draw(picture) for _ in range(count)]) for count, draw in self.draws]


class ImageEncoder(Encoder):
    """Base of the image encoders: `Encoder` with multi-crop.

    Args:
        embed_dim, feature_dim, settings: See `Encoder`.
        crops: What training draws of each picture, one entry per resolution, global crops first: views of it. Without, training
            uses the encoder's own transform.
        **head: See `Encoder`.
    """

    kind = "image"

    def __init__(
        self,
        embed_dim: int,
        feature_dim: int,
        settings: dict[str, Any],
        *,
        crops: Sequence[Crop | dict[str, Any]] | None = None,
        **head: Any,
    ) -> None:
        self.crops = [crop if isinstance(crop, Crop) else _crop(crop) for crop in crops or ()]
        if self.crops and head.get("views", 1) > 1:
            raise ConfigError("crops and views are both views of a picture", fix="give one of them")
        plain = [{**asdict(crop), "scale": list(crop.scale)} for crop in self.crops] or None
        super().__init__(embed_dim, feature_dim, {**settings, "crops": plain}, **head)

    def preprocess(self, train: bool) -> Callable[[Any], Input]:
        return MultiCrop(self.crops) if train and self.crops else super().preprocess(train)

    def blank(self, train: bool) -> Input:
        if not (train and self.crops):
            return super().blank(train)
        return [torch.zeros(crop.count, 3, crop.size, crop.size, dtype=torch.uint8) for crop in self.crops]


def _crop(values: dict[str, Any]) -> Crop:
    """What a model folder stored."""
    low, high = values.get("scale", Crop.scale)
    return Crop(**{**values, "scale": (low, high)})
