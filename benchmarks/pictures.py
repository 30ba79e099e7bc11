"""Shards of photograph-like JPEGs for the benchmark of the data layer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmrep.data.build import build_index
from mmrep.data.index import Modality
from mmrep.data.writer import write_shard

SHARD = 250
MODALITIES = {"image": Modality(("jpg",), "image"), "text": Modality(("txt",), "text")}


@dataclass(frozen=True)
class PictureSet:
    """What the pictures of a set are like.

    Attributes:
        sides: Least and greatest side in pixels.
        noise: Standard deviation of the grain, in levels: makes files as large as those of photographs.
        count: How many.
    """

    sides: tuple[int, int]
    noise: float
    count: int


SETS = {"64-224 px": PictureSet((64, 224), 20.0, 2000), "320-512 px": PictureSet((320, 512), 12.0, 500)}


def jpeg(rng: np.random.Generator, pictures: PictureSet) -> bytes:
    """One picture: soft shapes and grain."""
    width, height = rng.integers(pictures.sides[0], pictures.sides[1] + 1, 2).tolist()
    shapes = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.normal(scale=pictures.noise, size=(height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(shapes) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_pictures(folder: Path, pictures: PictureSet) -> list[Path]:
    """Write shards with a picture, a caption and a record each, and their index; gives the shards."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    shards = []
    for start in range(0, pictures.count, SHARD):
        samples = [
            {
                "__key__": f"{number:09d}",
                "jpg": jpeg(rng, pictures),
                "txt": f"a photograph of number {number}, on a table",
                "json": {"number": number, "licence": "none", "similarity": float(rng.random())},
            }
            for number in range(start, min(start + SHARD, pictures.count))
        ]
        shards.append(folder / f"train-{start // SHARD:05d}.tar")
        write_shard(shards[-1], samples)
    build_index(folder, MODALITIES).save()
    return shards
