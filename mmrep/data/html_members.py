"""Members of a sample as HTML: a small picture, a caption, an audio player, an array's figures.

Whatever comes from the shards is escaped, and decoded by `mmrep.data.decode` alone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from mmrep.data.decode import Waveform, decode
from mmrep.data.reader import Samples, Stored, Where
from mmrep.data.stats import size
from mmrep.errors import SampleError

THUMBNAIL = 160
"""Pixels of a picture's longer side."""
MAX_AUDIO_BYTES = 300_000
MAX_CHARACTERS = 240
BINS = 60
"""Of a sparkline: the smallest and largest value of each are drawn."""
AUDIO_TYPES = {"flac": "audio/flac", "wav": "audio/wav", "ogg": "audio/ogg", "mp3": "audio/mpeg"}


@dataclass(frozen=True)
class Member:
    """One modality of a sample: its name, the HTML that shows it or says why not, and whether it is broken."""

    name: str
    html: str
    broken: bool = False


def read_members(samples: Samples, number: int, names: Sequence[str]) -> list[Member]:
    """Some modalities of a sample, those that it lacks too.

    Raises:
        DataError: If its shard cannot be read. A member that cannot be used is shown as such.
    """
    stored = samples.read_many(np.array([number]), [samples.columns(name) for name in names])[0]
    members = []
    for name, member in zip(names, stored, strict=True):
        try:
            members.append(Member(name, _content(samples, number, samples.index.modalities[name].kind, member)))
        except SampleError as error:
            members.append(Member(name, f'<span class="why">{escape(error.what)}</span>', broken=True))
    return members


def show(kind: str, raw: Any, extension: str, data: bytes) -> str:
    """A decoded member as HTML.

    Args:
        kind: A key of `mmrep.data.decode.KINDS`.
        raw: What `mmrep.data.decode.decode` gave.
        extension, data: Of the member as it is stored: a player is given its bytes.
    """
    return SHOWN[kind](raw, extension, data)


def _content(samples: Samples, number: int, kind: str, member: Stored) -> str:
    if member is None:
        return '<span class="muted">\N{EN DASH}</span>'
    if isinstance(member, SampleError):
        raise member
    extension, data = member
    return show(kind, decode(kind, extension, data, Where(samples, number)), extension, data)


def _image(image: Image.Image, extension: str, data: bytes) -> str:
    original = f"{image.width} \N{MULTIPLICATION SIGN} {image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.info = {}  # a comment would be written too
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f'<small>{original}</small><img src="{_uri("image/jpeg", buffer.getvalue())}" alt="">'


def _text(text: str, extension: str, data: bytes) -> str:
    short = text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "\N{HORIZONTAL ELLIPSIS}"
    return f'<span dir="auto">{escape(short)}</span>'


def _audio(waveform: Waveform, extension: str, data: bytes) -> str:
    values, rate = waveform
    about = f"<small>{len(values) / rate:.2f} s, {rate} Hz</small>"
    if len(data) > MAX_AUDIO_BYTES:
        return f"{about} <small>{size(len(data))}</small>"
    return f'{about}<audio controls src="{_uri(AUDIO_TYPES[extension.rsplit(".", 1)[-1]], data)}"></audio>'


def _array(array: np.ndarray, extension: str, data: bytes) -> str:
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, array.shape)) or "scalar"
    finite = array[np.isfinite(array)]
    extent = f"{float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.size else "no number"
    rest = f", {array.size - finite.size} not finite" if array.size > finite.size and finite.size else ""
    return f"<small>{shape} {array.dtype}, {extent}{rest}</small>{_sparkline(array)}"


def _sparkline(array: np.ndarray) -> str:
    """The values along the longest axis, at the start of all others."""
    if not array.ndim or not array.size:
        return ""
    longest = int(np.argmax(array.shape))
    line = array[tuple(slice(None) if axis == longest else 0 for axis in range(array.ndim))].astype(np.float64)
    line = line[np.isfinite(line)] / 2  # halves, whose differences are finite
    if len(line) > 2 * BINS:
        line = np.array([value for part in np.array_split(line, BINS) for value in (part.min(), part.max())])
    if len(line) < 2:
        return ""
    low, extent = line.min(), line.max() - line.min()
    heights = 19 - 18 * ((line - low) / extent if extent else np.full(len(line), 0.5))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(np.linspace(0, 120, len(line)), heights, strict=True))
    return f'<svg class="sparkline" viewBox="0 0 120 20" preserveAspectRatio="none"><polyline points="{points}"/></svg>'


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


SHOWN: dict[str, Callable[[Any, str, bytes], str]] = {"image": _image, "text": _text, "audio": _audio, "array": _array}
