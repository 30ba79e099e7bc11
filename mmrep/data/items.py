"""Items that a user hands over in Python, as an encoder's transform takes them."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrep.data.decode import MAX_ASPECT, MAX_RATE, MIN_RATE, NUMBERS, Waveform, decode_file, is_strip, upright_rgb
from mmrep.errors import DataError


def raw_item(kind: str, value: Any, where: str) -> Any:
    """What `mmrep.data.decode.decode` would have given for an item of this kind.

    Args:
        kind: One of `mmrep.data.decode.KINDS`.
        value: A path, or for ``text`` the text; for ``image`` a picture or uint8 array ``[H, W, 3]`` or ``[H, W]``; for
            ``audio`` (samples, rate in Hz); for ``array`` an array.
        where: Name and number of the item, for the message.

    Raises:
        DataError: If the item is of another type or shape.
    """
    if kind == "text":
        if not isinstance(value, str):
            raise DataError(f"a text is {type(value).__name__}", where=where, fix="give a str")
        return value
    if isinstance(value, str | Path):
        return decode_file(kind, value)
    if kind == "image":
        return _picture(value, where)
    if kind == "audio":
        return _waveform(value, where)
    array = np.asarray(value)
    if array.dtype.kind not in NUMBERS:
        raise DataError(f"an array of {array.dtype}", where=where, fix="give numbers")
    return array


def _picture(value: Any, where: str) -> Image.Image:
    if isinstance(value, Image.Image):
        if value.mode in ("I", "F"):
            raise DataError(
                f"a picture of mode {value.mode}, whose white may be any number",
                where=where,
                fix="scale it to 0..255 and give image.convert('L')",
            )
        return _no_strip(upright_rgb(value), where)
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise DataError(
            f"a picture is an array of {pixels.dtype} {list(pixels.shape)}",
            where=where,
            fix="give a path, a PIL image, or uint8 [H, W, 3] or [H, W]",
        )
    return _no_strip(Image.fromarray(pixels).convert("RGB"), where)


def _no_strip(picture: Image.Image, where: str) -> Image.Image:
    if is_strip(picture.width, picture.height):
        raise DataError(
            f"a picture of {picture.width} x {picture.height} pixels, one side more than {MAX_ASPECT} times the other",
            where=where,
            fix="cut it",
        )
    return picture


def _waveform(value: Any, where: str) -> Waveform:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise DataError(f"a sound is {type(value).__name__}", where=where, fix="give a path or (samples, rate in Hz)")
    samples, rate = np.asarray(value[0]), value[1]
    if not isinstance(rate, Integral) or not MIN_RATE <= int(rate) <= MAX_RATE:
        raise DataError(
            f"a rate of {rate!r}", where=where, fix=f"give it in Hz, a whole number from {MIN_RATE} to {MAX_RATE}"
        )
    if not np.issubdtype(samples.dtype, np.floating) or samples.ndim not in (1, 2):
        raise DataError(
            f"samples are an array of {samples.dtype} {list(samples.shape)}",
            where=where,
            fix="give floats in [-1, 1], [N] or [channels, N]",
        )
    if samples.ndim == 2 and samples.shape[0] > samples.shape[1]:
        raise DataError(
            f"{samples.shape[0]} channels", where=where, fix="give [channels, N]: transpose what soundfile reads"
        )
    mono = samples.mean(axis=0) if samples.ndim == 2 else samples
    return mono.astype(np.float32), int(rate)
