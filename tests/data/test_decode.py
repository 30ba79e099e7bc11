"""Decoding by an allow-list: right content comes through, anything else is one DataError, soon and in little memory."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmrep.data.decode import decode, decode_file, upright_rgb
from mmrep.data.writer import npy_bytes
from mmrep.errors import DataError, SampleError
from tests.tiny import flac, png


def image_bytes(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[arg-type]  # whatever the format takes
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("extension", "format"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("x.jpeg", "JPEG")]
)
def test_images_become_rgb(extension: str, format: str) -> None:
    image = decode("image", extension, image_bytes(Image.new("L", (5, 3), 200), format), "here")
    assert image.mode == "RGB" and image.size == (5, 3) and abs(image.getpixel((1, 1))[0] - 200) < 4


def test_transparency_becomes_white() -> None:
    image = decode("image", "png", image_bytes(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), "PNG"), "here")
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_camera_picture_comes_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode("image", "jpg", image_bytes(Image.new("RGB", (8, 4)), "JPEG", exif=exif), "here").size == (4, 8)


def test_of_16_bit_grey_the_upper_8_are_taken() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2)
    picture = Image.fromarray(ramp)
    assert picture.mode == "I;16"
    for image in (
        decode("image", "png", image_bytes(picture, "PNG"), "here"),
        upright_rgb(picture),
        upright_rgb(Image.frombytes("I;16B", (256, 256), ramp.astype(">u2").tobytes())),
    ):
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
    expected[1, 2] = 255  # this level is transparent, and its neighbours of the same upper bits are not
    transparent = image_bytes(picture, "PNG", transparency=258)
    assert np.array_equal(np.asarray(decode("image", "png", transparent, "here")), expected)


@pytest.mark.parametrize("extension", ["flac", "wav", "ogg", "mp3"])
def test_audio_becomes_mono_float(extension: str) -> None:
    stereo = np.stack([np.sin(np.arange(8000) / 9), np.zeros(8000)], axis=1) * 0.5
    buffer = io.BytesIO()
    soundfile.write(buffer, stereo, 16000, format=extension.upper())
    samples, rate = decode("audio", extension, buffer.getvalue(), "here")
    assert rate == 16000 and samples.dtype == np.float32 and samples.ndim == 1
    assert np.abs(samples).max() == pytest.approx(0.25, abs=0.05)


def wave(rate: int, **options: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(50, 0.5, np.float32), rate, format=options.pop("format", "WAV"), **options)
    return buffer.getvalue()


def test_a_wave_may_have_the_extensible_header() -> None:
    samples, rate = decode("audio", "wav", wave(16000, format="WAVEX", subtype="PCM_24"), "here")
    assert rate == 16000 and np.allclose(samples, 0.5)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2_000_000_000])
def test_a_rate_that_no_sound_has_is_refused(rate: int) -> None:
    with pytest.raises(SampleError, match=f"a rate of {rate} Hz is not between 1000 and 768000"):
        decode("audio", "wav", wave(rate), "here")


@pytest.mark.parametrize(("extension", "format"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_strips_are_refused(extension: str, format: str) -> None:
    for size in ((2, 400), (400, 2)):
        assert decode("image", extension, image_bytes(Image.new("RGB", size), format), "here").size == size
    for size in ((2, 401), (401, 2), (1, 10_000)):
        with pytest.raises(SampleError, match="more than 200 times the other") as caught:
            decode("image", extension, image_bytes(Image.new("RGB", size), format), "here")
        assert caught.value.reason == "too large"


def test_text_json_and_arrays() -> None:
    assert decode("text", "txt", "größe".encode(), "here") == "größe"
    assert decode("json", "json", b'{"a": 1}', "here") == {"a": 1}
    for array in (np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.eye(3)), np.array(5, np.int16)):
        assert np.array_equal(decode("array", "npy", npy_bytes(array), "here"), array)


def huge_png() -> bytes:
    """A picture of 40,000 x 40,000 pixels in a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def lying_npy(shape: str, descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + bytes(16)


BAD = {
    "empty png": ("image", "png", b""),
    "cut png": ("image", "png", png((1, 2, 3), 64)[:90]),
    "jpeg named png": ("image", "png", image_bytes(Image.new("RGB", (4, 4)), "JPEG")),
    "postscript named jpg": ("image", "jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "strip": ("image", "png", image_bytes(Image.new("RGB", (1, 1_000_000)), "PNG")),
    "gif": ("image", "gif", image_bytes(Image.new("RGB", (4, 4)), "GIF")),
    "pixel bomb": ("image", "png", huge_png()),
    "text as audio": ("audio", "flac", b"hello"),
    "wav named flac": ("audio", "flac", b"RIFF" + flac(300)[4:]),
    "cut flac": ("audio", "flac", flac(300)[:30]),
    "not utf-8": ("text", "txt", b"\xff\xfe\xfd"),
    "too much text": ("text", "txt", b"a" * 300_000),
    "json bomb": ("json", "json", b"[" * 200_000),
    "object array": ("array", "npy", lying_npy("(2,)", "'|O'")),
    "array of 6 GiB": ("array", "npy", lying_npy("(1500000000,)")),
    "negative shape": ("array", "npy", lying_npy("(-1, -4)")),
    "broken array header": ("array", "npy", lying_npy("(2,")),
    "pickle named npy": ("array", "npy", pickle.dumps({"a": 1})),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_refused_quickly_and_names_its_place(case: str) -> None:
    kind, extension, data = BAD[case]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match=r"shard\.tar:key7"):
        decode(kind, extension, data, "shard.tar:key7")
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_flipped_bytes_give_content_or_a_data_error() -> None:
    rng = np.random.default_rng(0)
    sources = {
        "png": ("image", png((9, 99, 199), 24)),
        "flac": ("audio", flac(440, 0.05)),
        "npy": ("array", npy_bytes(np.eye(4))),
    }
    for extension, (kind, data) in sources.items():
        for _ in range(200):
            broken = bytearray(data)
            broken[rng.integers(len(broken))] ^= 1 << int(rng.integers(8))
            with contextlib.suppress(DataError):
                decode(kind, extension, bytes(broken), "here")


def test_files_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((1, 2, 3)))
    assert decode_file("image", tmp_path / "a.png").size == (16, 16)
    with pytest.raises(DataError, match="no such image file"):
        decode_file("image", tmp_path / "b.png")
    assert json.loads("{}") == {}
