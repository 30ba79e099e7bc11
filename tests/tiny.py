"""Small tri-modal shards that can be learned: a class is a colour, a word and a tone."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mmrep.data.build import build_index
from mmrep.data.index import Label, Modality
from mmrep.data.writer import write_shard

CLASSES = ["red", "green", "blue", "white", "black", "yellow"]
COLOURS = [(220, 30, 30), (30, 200, 30), (30, 30, 220), (250, 250, 250), (5, 5, 5), (230, 220, 20)]
MODALITIES = {
    "image": Modality(("png",), "image"),
    "text": Modality(("txt",), "text"),
    "audio": Modality(("flac",), "audio"),
}


def png(colour: tuple[int, int, int], size: int = 16, noise: int = 0) -> bytes:
    """A square of one colour, with a little noise."""
    pixels = np.clip(np.array(colour) + np.random.default_rng(noise).integers(-9, 10, (size, size, 3)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def flac(frequency: float, seconds: float = 0.2, rate: int = 16000, phase: float = 0.0) -> bytes:
    """A tone."""
    times = np.arange(round(seconds * rate)) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.5 * np.sin(2 * np.pi * frequency * times + phase), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def sample(key: str, number: int) -> dict[str, Any]:
    """Sample ``number``: all modalities but for a few holes, so that presence matters."""
    label = number % len(CLASSES)
    members: dict[str, Any] = {"__key__": key, "json": {"label": label, "number": number}}
    if number % 7 != 3:
        members["png"] = png(COLOURS[label], noise=number)
    if number % 11 != 5:
        members["txt"] = f"a {CLASSES[label]} thing {number % 3}"
    if number % 5 != 4:
        members["flac"] = flac(250.0 * 1.5**label, phase=number)
    return members


def write_tiny_shards(folder: Path, splits: dict[str, tuple[int, ...]] | None = None) -> Path:
    """Write shards of the given sizes, and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, sizes in (splits or {"train": (20, 28), "val": (20,), "test": (13, 7)}).items():
        for shard, size in enumerate(sizes):
            samples = [sample(f"{split}-{shard}-{i:04d}", number + i) for i in range(size)]
            write_shard(folder / f"{split}-{shard:06d}.tar", samples)
            number += size
    build_index(folder, MODALITIES, group_key="label", labels={"label": Label(CLASSES)}).save()
    return folder


def damaged(whole: bytes, kind: str, rng: random.Random) -> bytes:
    """A tar with one random fault: ``cut``, a ``flip`` of one bit, or a ``zero`` ed block."""
    broken, place = bytearray(whole), rng.randrange(len(whole))
    if kind == "cut":
        del broken[place:]
    elif kind == "flip":
        broken[place] ^= 1 << rng.randrange(8)
    else:
        start = place // 512 * 512
        broken[start : start + 512] = bytes(512)
    return bytes(broken)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """The content of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
