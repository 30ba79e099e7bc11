"""Bytes of a member -> PIL image, waveform, str or array, by an allow-list of formats with a bound on every size.

Nothing here unpickles, sniffs another format than the extension says, or allocates what a header merely claims.
"""

from __future__ import annotations

import io
import json
import math
import re
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
MAX_ASPECT = 200
"""Longer side over shorter one: encoders resize the shorter one to their resolution, and the longer one goes along."""
MAX_SCANS = 100
"""Of a JPEG: each passes over all its pixels, however few bytes it has. Cameras and libraries write about ten."""
NUMBERS = "biuf"
"""Kinds of arrays that are taken: booleans, integers, floats."""
MAX_TEXT_BYTES = 256 * 1024
MAX_AUDIO_SAMPLES = 48_000 * 60 * 30
"""Half an hour at 48 kHz, over all channels."""
MIN_RATE, MAX_RATE = 1_000, 768_000
"""In Hz: what lies beyond is a damaged header."""
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
START_OF_FRAME, END_OF_IMAGE, START_OF_SCAN = 0xC0, 0xD9, 0xDA
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
"""What is no pixel, no filling and no restart."""
MOST_SEGMENTS = 1000

IMAGE_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
AUDIO_FORMATS = {"flac": ("FLAC",), "wav": ("WAV", "WAVEX"), "ogg": ("OGG",), "mp3": ("MP3",)}


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
    if suffix in ("jpg", "jpeg"):
        if (scans := _scans(data)) > MAX_SCANS:
            raise SampleError(
                f"a JPEG of {scans} scans, more than {MAX_SCANS}", fix="write the picture anew", reason="too large"
            )
        if (picture := _turbo_jpeg(data)) is not None:
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
    if is_strip(image.width, image.height):
        raise SampleError(
            f"{image.width} x {image.height} pixels, one side more than {MAX_ASPECT} times the other",
            fix="cut the picture",
            reason="too large",
        )
    return upright_rgb(image)


def is_strip(width: int, height: int) -> bool:
    """Whether a picture is too long for its width to be resized."""
    return max(width, height) > MAX_ASPECT * min(width, height)


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture as encoders take it: turned as its camera was held (but for PNG), on white where transparent, RGB.

    Of 16 bits a channel the upper 8 are taken.
    """
    if image.format != "PNG":
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return _upper_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, as X-rays are stored, to 8 bits as Pillow itself reads 16-bit colour: its ``convert`` cuts off at 255."""
    levels = np.asarray(image)
    grey = (levels >> 8).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        grey[levels == transparent] = 255
    return Image.fromarray(grey)


def _scans(data: bytes) -> int:
    """How many scans a JPEG has up to its end; never fewer than a decoder meets.

    Bytes that look like one, in a thumbnail or in the film that a phone appends, are told apart where it matters.
    """
    content = np.frombuffer(data, np.uint8)  # in an eighth of the time of bytes.count
    most = int(np.count_nonzero((content[1:] == START_OF_SCAN) & (content[:-1] == 0xFF)))
    if most <= MAX_SCANS:
        return most
    scans, at = 0, 2
    for _ in range(MOST_SEGMENTS):
        found = MARKER.search(data, at)
        if found is None or (code := found[0][1]) == END_OF_IMAGE:
            return scans
        scans, at = scans + (code == START_OF_SCAN), found.end()
        if code >= START_OF_FRAME:  # what lies below has no length, and decoders pass it in search of a restart
            at += int.from_bytes(data[at : at + 2], "big")
    return most


def _turbo_jpeg(data: bytes) -> Image.Image | None:
    """An ordinary JPEG by simplejpeg: Pillow's pixels, bit by bit, in less time (``make bench-streaming``).

    None where it is not installed, and for all that is not ordinary (another colour space, a camera's orientation, damage,
    too many pixels, a strip): that is Pillow's to decide.
    """
    if simplejpeg is None or not _is_upright(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or height * width > MAX_PIXELS or is_strip(width, height):
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
        if file.format not in AUDIO_FORMATS[_allowed(suffix, AUDIO_FORMATS)]:
            raise SampleError(f"the content is {file.format}")
        if not MIN_RATE <= file.samplerate <= MAX_RATE:
            raise SampleError(f"a rate of {file.samplerate} Hz is not between {MIN_RATE} and {MAX_RATE}")
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
