"""Random crops of a picture at a network's resolution, as uint8; ``make bench-streaming`` has their cost beside Pillow's."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrep.errors import ConfigError, check_choice

BACKENDS = ("torch", "opencv")


RATIO = (3 / 4, 4 / 3)
"""Least and greatest width over height."""
ATTEMPTS = 10


def random_part(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part of a picture, of the distribution of torchvision's ``RandomResizedCrop``.

    Written anew since that draws each number as a tensor of its own.

    Args:
        height, width: Of the picture, in pixels.
        scale: Least and greatest share of its area.
    """
    draws = torch.rand(ATTEMPTS, 4).tolist()
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for area, ratio, down, across in draws:
        pixels = height * width * (scale[0] + (scale[1] - scale[0]) * area)
        aspect = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(across * (width - w + 1)), h, w
    w, h = width, height  # the central part of the nearest shape
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


class RandomResizedCrop:
    """A random part of a picture, resized with bicubic interpolation: ``PIL.Image`` to uint8 ``[3, size, size]``.

    The part is drawn as torchvision's ``RandomResizedCrop`` draws it.

    Args:
        size: In pixels a side.
        scale: Least and greatest share of the picture's area.
        backend: ``torch`` has Pillow's pixels up to two of 255 levels (a hundredth of one on average). ``opencv`` enlarges
            pictures in half the time and differs by one or two on average, up to fifteen or so: its cubic kernel is another.
            Those larger than ``size`` are torch's even then.

    Raises:
        ConfigError: If opencv is asked for and not installed.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.9, 1.0), backend: str = "torch") -> None:
        check_choice("resize", backend, BACKENDS)
        if backend == "opencv":
            _cv2()
        self.size, self.scale, self.backend = size, scale, backend

    def __call__(self, picture: Image.Image) -> Tensor:
        top, left, height, width = random_part(picture.height, picture.width, self.scale)
        pixels = np.asarray(picture)[top : top + height, left : left + width]
        resized: Tensor = _torch(pixels, self.size) if self.backend == "torch" else _opencv(pixels, self.size)
        return resized


def _torch(pixels: np.ndarray, size: int) -> Tensor:
    # A view with the channels last in memory: the only layout for which torch resizes bytes as bytes, three at a time.
    batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    resize = partial(torch.nn.functional.interpolate, mode="bicubic", antialias=True)
    height, width = pixels.shape[:2]
    if height > size and height - size > 2 * (
        width - size
    ):  # here Pillow (since 13) begins with the height, torch never
        batch = resize(batch, (size, width))
    return resize(batch, (size, size))[0]


def _opencv(pixels: np.ndarray, size: int) -> Tensor:
    if max(pixels.shape[:2]) > size:  # only INTER_AREA shrinks without aliasing, and it is slow
        return _torch(pixels, size)
    cv2 = _cv2()
    resized = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(resized).permute(2, 0, 1)


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ConfigError("resize=opencv needs OpenCV", fix="pip install 'mmrep[fast]'") from error
    cv2.setNumThreads(0)  # the loader's workers are the threads
    return cv2
