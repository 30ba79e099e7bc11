"""Bytes of a member -> PIL image, waveform, str or array, by an allow-list of formats with a bound on every size.

Nothing here unpickles, sniffs another format than the extension says, or allocates what a header merely claims.
"""

from __future__ import annotations

import io
import json
import math
import tokenize
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmrep.errors import DataError, SampleError

try:
    import simplejpeg
except ImportError:  # an extra
    simplejpeg = None

MAX_PIXELS = 64_000_000
NUMBERS = "biuf"
"""Kinds of arrays that are taken: booleans, integers, floats."""
MAX_TEXT_BYTES = 256 * 1024
MAX_AUDIO_SAMPLES = 48_000 * 60 * 30
"""Half an hour at 48 kHz, over all channels."""
MAX_ARRAY_BYTES = 256 * 1024 * 1024

MAX_IMAGE_BYTES = 128 * 1024 * 1024
MAX_AUDIO_BYTES = 512 * 1024 * 1024

KINDS: dict[str, tuple[str, ...]] = {
    "image": ("png", "jpg", "jpeg", "webp"),
    "text": ("txt",),
    "audio": ("flac", "wav", "ogg", "mp3"),
    "array": ("npy",),
}
"""What a modality can be, and the extensions that may carry it: the allow-list of formats."""

MAX_BYTES = {
    "image": MAX_IMAGE_BYTES,
    "text": MAX_TEXT_BYTES,
    "audio": MAX_AUDIO_BYTES,
    "array": MAX_ARRAY_BYTES,
    "json": MAX_TEXT_BYTES,
}
"""Of one member as it is stored: what is larger is not even read."""

Waveform = tuple[np.ndarray, int]
"""Mono float32 samples ``[T]`` in [-1, 1], and their rate in Hz."""

PLAIN_SEGMENTS = frozenset({*range(0xC0, 0xD0), 0xDB, 0xDC, 0xDD, 0xE0, *range(0xE2, 0xF0), 0xFE})
"""Markers that may come before the pixels of a JPEG stored upright: not APP1 (0xE1), whose Exif or XMP may say otherwise."""
START_OF_SCAN = 0xDA
MOST_SEGMENTS = 1000

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
AUDIO_FORMATS = {"flac": "FLAC", "wav": "WAV", "ogg": "OGG", "mp3": "MP3"}


BROKEN = (
    *(OSError, ValueError, RuntimeError, SyntaxError, EOFError, TypeError, RecursionError),
    *(Image.DecompressionBombError, tokenize.TokenError),  # what Pillow and NumPy's header parser add
)


def decode(kind: str, extension: str, data: bytes, where: object) -> Any:
    """Decode one member.

    Args:
        kind: ``image`` gives an RGB ``PIL.Image``, ``audio`` a `Waveform`, ``text`` a str, ``array`` a NumPy array,
            ``json`` what the JSON holds.
        extension: The member's extension; only the format that it names is accepted.
        data: The member's bytes.
        where: What to name in an error: shard and key.

    Raises:
        SampleError: If the bytes are damaged, of another format, or larger than the bound.
    """
    suffix = extension.rsplit(".", 1)[-1].lower()
    try:
        return DECODERS[kind](suffix, data)
    except SampleError as error:
        raise SampleError(
            f"{kind} .{extension}: {error.what}", where=where, fix=error.fix, reason=error.reason
        ) from error
    except BROKEN as error:
        raise SampleError(
            f"{kind} .{extension} cannot be decoded ({str(error) or type(error).__name__})", where=where
        ) from error


def decode_file(kind: str, path: Path | str) -> Any:
    """Decode a file of the user's own, as `decode` does a member."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such {kind} file", where=path)
    return decode(kind, path.suffix.removeprefix("."), path.read_bytes(), path)


def _image(suffix: str, data: bytes) -> Image.Image:
    if suffix in ("jpg", "jpeg") and (picture := _turbo_jpeg(data)) is not None:
        return picture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is checked below
        image: Image.Image = Image.open(io.BytesIO(data), formats=[IMAGE_FORMATS[_allowed(suffix, IMAGE_FORMATS)]])
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(
            f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}",
            fix="shrink the picture",
            reason="too large",
        )
    return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as encoders take it: turned as its camera was held (but for PNG), on white where transparent, RGB."""
    if image.format != "PNG":
        image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _turbo_jpeg(data: bytes) -> Image.Image | None:
    """An ordinary JPEG by simplejpeg: Pillow's pixels, bit by bit, in less time (``make bench-streaming``).

    None where it is not installed, and for all that is not ordinary (another colour space, a camera's orientation, damage,
    too many pixels): that is Pillow's to decide.
    """
    if simplejpeg is None or not _is_upright(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or height * width > MAX_PIXELS:
            return None
        return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
    except ValueError:
        return None


def _is_upright(data: bytes) -> bool:
    """Whether a JPEG's header surely says nothing of how the camera was held."""
    at = 2
    for _ in range(MOST_SEGMENTS):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if len(marker) < 2 or marker[0] != 0xFF or marker[1] not in PLAIN_SEGMENTS:
            return marker == bytes((0xFF, START_OF_SCAN))
        at += 2 + length
    return False


def _audio(suffix: str, data: bytes) -> Waveform:
    import soundfile

    with soundfile.SoundFile(io.BytesIO(data)) as file:
        if file.format != AUDIO_FORMATS[_allowed(suffix, AUDIO_FORMATS)]:
            raise SampleError(f"the content is {file.format}")
        if file.frames * file.channels > MAX_AUDIO_SAMPLES:
            raise SampleError(
                f"{file.frames} frames of {file.channels} channels are too long", fix="cut the clip", reason="too large"
            )
        samples = file.read(file.frames, dtype="float32", always_2d=True)
        return samples.mean(axis=1), file.samplerate


def _text(suffix: str, data: bytes) -> str:
    _allowed(suffix, {"txt"})
    if len(data) > MAX_TEXT_BYTES:
        raise SampleError(f"{len(data)} bytes of text are more than {MAX_TEXT_BYTES}", reason="too large")
    return data.decode("utf-8")


def _array(suffix: str, data: bytes) -> np.ndarray:
    _allowed(suffix, {"npy"})
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(file)
    payload = len(data) - file.tell()
    if dtype.kind not in NUMBERS or len(data) > MAX_ARRAY_BYTES:
        raise SampleError(f"an array of {dtype} and {len(data)} bytes is refused", fix="store numbers, at most 256 MiB")
    if math.prod(shape) * dtype.itemsize != payload:  # before allocating what the header claims
        raise SampleError(f"the header claims shape {shape} of {dtype}, the payload has {payload} bytes")
    flat = np.frombuffer(data, dtype=dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def _json(suffix: str, data: bytes) -> Any:
    _allowed(suffix, {"json"})
    if len(data) > MAX_TEXT_BYTES:
        raise SampleError(f"{len(data)} bytes of JSON are more than {MAX_TEXT_BYTES}", reason="too large")
    return json.loads(data)


def _allowed(suffix: str, allowed: Any) -> str:
    if suffix not in allowed:
        raise SampleError("no decoder for this format", fix=f"use {', '.join(sorted(allowed))}")
    return suffix


DECODERS: dict[str, Callable[[str, bytes], Any]] = {
    "image": _image,
    "audio": _audio,
    "text": _text,
    "array": _array,
    "json": _json,
}
