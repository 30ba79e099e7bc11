"""A page that shows what is in a set of shards: figures, and samples of each split as a person sees and hears them.

One file without scripts or links. Whatever comes from the shards is escaped, and decoded by `mmrep.data.decode` alone.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrep.data.decode import Waveform, decode
from mmrep.data.index import Index
from mmrep.data.locations import is_url
from mmrep.data.reader import Samples, Stored, Where
from mmrep.data.stats import HEADINGS, share, size, split_stats, stats_rows, summary
from mmrep.errors import SampleError

THUMBNAIL = 160
"""Pixels of a picture's longer side."""
MAX_AUDIO_BYTES = 300_000
MAX_CHARACTERS = 240
BINS = 60
"""Of a sparkline: the smallest and largest value of each are drawn."""
AUDIO_TYPES = {"flac": "audio/flac", "wav": "audio/wav", "ogg": "audio/ogg", "mp3": "audio/mpeg"}

HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --bad: light-dark(#b00020, #ff8a80); }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 24px; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 17px; margin-top: 32px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th.words, td.words {{ text-align: left; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 12px; }}
.card {{ border: 1px solid var(--line); border-radius: 6px; padding: 10px; overflow-wrap: anywhere; }}
.card.bad {{ border-color: var(--bad); }} .why {{ color: var(--bad); }}
.card p {{ margin: 6px 0 0; }} .card header {{ font-weight: 600; }}
.muted, .card small {{ opacity: 0.65; font-weight: normal; }}
img {{ display: block; max-width: 100%; }} audio {{ width: 100%; height: 34px; }}
svg {{ display: block; width: 100%; height: 40px; }}
polyline {{ fill: none; stroke: currentColor; stroke-width: 1; vector-effect: non-scaling-stroke; }}
</style>
</head>
<body>
"""


def write_contact_sheet(index: Index, path: Path, *, per_split: int = 24) -> Path:
    """Write the page: the same shards give the same bytes.

    Args:
        index: Of the shards.
        path: The page. It is written beside and renamed.
        per_split: Samples of each split, evenly spaced.

    Raises:
        DataError: If a shard is not there, or is not the one that was indexed. A sample that cannot be used is shown as such.
    """
    root = index.root if is_url(index.root) else str(Path(index.root).resolve())
    title = escape(f"Shards of {root.rstrip('/').rpartition('/')[2]}")
    parts = [HEAD.format(title=title), f"<h1>{title}</h1>\n", _table(HEADINGS, stats_rows(index), (0, 4))]
    parts += [
        f'<p class="muted">{escape(summary(index))}</p>\n',
        "<h2>Which modalities come together</h2>\n",
        _sets(index),
    ]
    for split in index.splits:
        samples = Samples(index, split)
        numbers = _evenly_spaced(len(samples), per_split)
        shown = f"{len(numbers)} of {len(samples)} samples"
        parts.append(f'<h2>{escape(split)} <small class="muted">{shown}</small></h2>\n<div class="grid">\n')
        parts += [_card(samples, number) for number in numbers]
        parts.append("</div>\n")
    parts.append("</body>\n</html>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        # A name from index.json may hold what UTF-8 cannot.
        beside.write_text("".join(parts), encoding="utf-8", errors="replace")
        return beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _evenly_spaced(total: int, most: int) -> list[int]:
    count = min(total, most)
    return [number * total // count for number in range(count)]


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int]) -> str:
    """``words``: the columns that hold words, not figures."""

    def cells(tag: str, texts: Sequence[str]) -> str:
        kinds = [' class="words"' if column in words else "" for column in range(len(texts))]
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    lines = [f"<tr>{cells('th', headings)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>\n"


def _sets(index: Index) -> str:
    """A row for each set of modalities, a column for each split."""
    figures = {split: split_stats(index, split) for split in index.splits}
    known = {modalities for each in figures.values() for modalities in each["sets"]}
    total = {modalities: sum(each["sets"].get(modalities, 0) for each in figures.values()) for modalities in known}
    rows = [
        (
            " + ".join(modalities) or "none",
            *(share(each["sets"].get(modalities, 0), each["samples"]) for each in figures.values()),
        )
        for modalities in sorted(known, key=lambda modalities: (-total[modalities], modalities))
    ]
    return _table(("modalities", *index.splits), rows, (0,))


def _card(samples: Samples, number: int) -> str:
    modalities = samples.index.modalities
    stored = samples.read_many(np.array([number]), [samples.columns(name) for name in modalities])[0]
    shown, bad = [], ""
    for name, member in zip(modalities, stored, strict=True):
        try:
            content = _content(samples, number, modalities[name].kind, member)
        except SampleError as error:
            content, bad = f'<span class="why">{escape(error.what)}</span>', " bad"
        shown.append(f"<p><small>{escape(name)}</small> {content}</p>")
    key, shard = escape(samples.key(number)), escape(samples.shard(number).name)
    return f'<div class="card{bad}"><header>{key}<br><small>{shard}</small></header>{"".join(shown)}</div>\n'


def _content(samples: Samples, number: int, kind: str, member: Stored) -> str:
    if member is None:
        return '<span class="muted">\N{EN DASH}</span>'
    if isinstance(member, SampleError):
        raise member
    extension, data = member
    return SHOWN[kind](decode(kind, extension, data, Where(samples, number)), extension, data)


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
    return f'<svg viewBox="0 0 120 20" preserveAspectRatio="none"><polyline points="{points}"/></svg>'


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


SHOWN: dict[str, Callable[[Any, str, bytes], str]] = {"image": _image, "text": _text, "audio": _audio, "array": _array}
