"""JPEGs by simplejpeg have Pillow's pixels bit for bit, and what it refuses is Pillow's to decide."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from mmrep.data import decode as module
from mmrep.data.decode import decode
from mmrep.errors import SampleError

simplejpeg = pytest.importorskip("simplejpeg")


def jpeg(size: tuple[int, int], mode: str = "RGB", orientation: int = 1, **options: object) -> bytes:
    rng = np.random.default_rng(size[0])
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"exif": exif} if orientation != 1 else {}
    buffer = io.BytesIO()
    coarse.convert(mode).save(buffer, "JPEG", **more, **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2, "big") + content


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """The same picture with more before its tables."""
    return data[:2] + b"".join(segments) + data[2:]


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
PROFILE = segment(0xE2, bytes(65_533))

CASES = {
    "4:4:4": jpeg((65, 70), subsampling=0),
    "4:2:2": jpeg((67, 71), subsampling=1),
    "4:2:0": jpeg((200, 133), subsampling=2),
    "quality 10": jpeg((90, 91), quality=10),
    "progressive": jpeg((120, 111), progressive=True),
    "one pixel": jpeg((1, 1)),
    "grey": jpeg((80, 60), "L"),
    "cmyk": jpeg((80, 60), "CMYK"),
    **{f"held {orientation}": jpeg((40, 60), orientation=orientation) for orientation in range(2, 9)},
    "held 6, by XMP": with_segments(jpeg((40, 60)), segment(0xE1, XMP)),
    "held 6, after a long profile": with_segments(jpeg((40, 60), orientation=6), *[PROFILE] * 5),
    "long profile": with_segments(jpeg((40, 60)), *[PROFILE] * 5),
    "filled up before a marker": with_segments(jpeg((40, 60)), b"\xff"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_pixels_with_and_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = decode("image", "jpg", CASES[name], "x")
    monkeypatch.setattr(module, "simplejpeg", None)
    reference = decode("image", "jpg", CASES[name], "x")
    assert fast.size == reference.size and fast.mode == reference.mode == "RGB"
    assert np.array_equal(np.asarray(fast), np.asarray(reference))


def test_it_is_used_for_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = simplejpeg.decode_jpeg

    def counted(data: bytes, *args: object, **kwargs: object) -> np.ndarray:
        calls.append(len(data))
        pixels: np.ndarray = real(data, *args, **kwargs)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counted)
    for name in ("4:2:0", "progressive", "grey", "cmyk", "held 6", "held 6, by XMP", "long profile"):
        decode("image", "jpg", CASES[name], "x")
    assert calls == [len(CASES[name]) for name in ("4:2:0", "progressive", "long profile")]


@pytest.mark.parametrize("with_it", [True, False])
def test_cut_ones_are_refused_either_way(with_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_it:
        monkeypatch.setattr(module, "simplejpeg", None)
    whole = CASES["4:2:0"]
    for length in (0, 3, 200, len(whole) // 2, len(whole) - 20):
        with pytest.raises(SampleError):
            decode("image", "jpg", whole[:length], "x")


def test_damage_is_judged_alike_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pictures = [CASES[name] for name in ("4:4:4", "4:2:2", "progressive", "grey")]
    refused = 0
    for number in range(400):
        broken = bytearray(pictures[number % len(pictures)])
        broken[rng.integers(700 if number % 2 else len(broken))] ^= 1 << int(rng.integers(8))
        found: list[np.ndarray | None] = []
        for library in (simplejpeg, None):
            monkeypatch.setattr(module, "simplejpeg", library)
            try:
                found.append(np.asarray(decode("image", "jpg", bytes(broken), "x")))
            except SampleError:
                found.append(None)
        fast, reference = found
        assert (fast is None) == (reference is None)
        refused += fast is None
        assert fast is None or reference is None or np.array_equal(fast, reference)
    assert 20 < refused < 380


@pytest.mark.parametrize("length", [0, 2])
def test_a_header_of_a_million_segments_is_refused_quickly(length: int) -> None:
    start = time.process_time()
    with pytest.raises(SampleError):
        decode("image", "jpg", b"\xff\xd8" + (b"\xff\xe0" + length.to_bytes(2, "big")) * 250_000, "x")
    assert time.process_time() - start < 2


def scans(more: int, between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes ``more`` times again."""
    data = jpeg((90, 80), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + (between + data[last:-2]) * more + data[-2:]


NOISE = segment(0xEE, b"\xff\xda" * 300)
"""Looks like scans: a thumbnail has such bytes, and a film behind the picture."""


@pytest.mark.parametrize("with_it", [True, False])
@pytest.mark.parametrize("between", [b"", segment(0xFE, b"\xff\xd9"), segment(0xFE, b"") * 20], ids=["", "end", "many"])
def test_many_scans_are_refused_before_they_are_decoded(
    with_it: bool, between: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object, **_options: object) -> None:
        raise AssertionError("decoded")

    if not with_it:
        monkeypatch.setattr(module, "simplejpeg", None)
    assert decode("image", "jpg", scans(20, between), "x").size == (90, 80)
    monkeypatch.setattr(module, "_turbo_jpeg", never)
    monkeypatch.setattr("mmrep.data.decode.Image.open", never)
    with pytest.raises(SampleError, match="scans, more than 100") as caught:
        decode("image", "jpg", scans(101, between), "x")
    assert caught.value.reason == "too large"


def test_what_only_looks_like_scans_is_not_counted() -> None:
    plain = jpeg((90, 80), progressive=True)
    expected = np.asarray(decode("image", "jpg", plain, "x"))
    for data in (with_segments(plain, NOISE), plain + NOISE):
        assert np.array_equal(np.asarray(decode("image", "jpg", data, "x")), expected)


def test_scans_behind_noise_that_a_decoder_passes_are_counted() -> None:
    """Below 0xC0 no marker has a length, whatever bytes follow it."""
    assert module._scans(scans(101, b"\xff\x02\xff\xff")) > 100
