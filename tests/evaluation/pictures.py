"""Pictures with a class and several captions, as shards; and a small open_clip model that is trained on them."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from mmrep.data.build import build_index
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Index, Label, Modality
from mmrep.data.reader import Samples
from mmrep.data.writer import write_shard
from mmrep.model import MultimodalModel

COLOURS = {"red": (220, 30, 30), "green": (30, 190, 40), "blue": (30, 40, 220), "black": (10, 10, 10)}
SHAPES = ("disc", "square", "bar")
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
TEMPLATES = ["a photo of a {c}.", "a {c}", "here is a {c} for you"]
PLACES = ("left", "right", "top", "corner", "middle", "edge", "shadow")


def picture(number: int, size: int = 40) -> bytes:
    """A shape of its class's colour somewhere on a noisy ground."""
    random = np.random.default_rng(number)
    colour, shape = CLASSES[number % len(CLASSES)].split()
    canvas = Image.fromarray(random.integers(200, 256, (size, size, 3)).astype(np.uint8))
    x, y, r = (int(random.integers(low, high)) for low, high in ((10, 30), (10, 30), (5, 10)))
    box = (x - r, y - r // (3 if shape == "bar" else 1), x + r, y + r // (3 if shape == "bar" else 1))
    draw = ImageDraw.Draw(canvas)
    (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=COLOURS[colour])
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def captions(number: int) -> list[str]:
    """One to five captions, unlike those of all other pictures."""
    name = CLASSES[number % len(CLASSES)]
    return [f"{name} {number} at the {PLACES[(number + n) % len(PLACES)]} {n}" for n in range(1 + number % 5)]


def write_pictures(folder: Path, count: int = 240, shards: int = 3) -> Path:
    """Shards of ``count`` pictures; captions beyond a picture's first are samples without a picture, of the same group."""
    folder.mkdir(parents=True)
    samples: list[dict[str, Any]] = []
    for number in range(count):
        facts = {"label": number % len(CLASSES), "item": number}
        for place, caption in enumerate(captions(number)):
            sample = {"__key__": f"{number:05d}-{place}", "txt": caption, "json": facts}
            samples.append(sample | ({} if place else {"png": picture(number)}))
    for shard in range(shards):
        part = slice(shard * len(samples) // shards, (shard + 1) * len(samples) // shards)
        write_shard(folder / f"test-{shard:06d}.tar", samples[part])
    modalities = {"image": Modality(("png",), "image"), "text": Modality(("txt",), "text")}
    labels = {"label": Label(CLASSES, TEMPLATES)}
    build_index(folder, modalities, group_key="item", labels=labels).save()
    return folder


CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def write_open_clip(folder: Path) -> Path:
    """A folder of open_clip's with random weights."""
    import open_clip

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    weights = open_clip.CLIP(**CONFIG["model_cfg"]).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    return folder


def train(model: MultimodalModel, shards: Path, split: str, steps: int) -> None:
    """A few steps on pictures and captions: far from chance then, far from perfect."""
    encoders = model.by_modality
    dataset = ShardDataset(Samples(Index.load(shards), split), encoders, global_batch_size=48, train=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for epoch in itertools.count():
        for batch in make_loader(dataset, encoders, position=lambda epoch=epoch: (epoch, 0)):
            optimizer.zero_grad()
            model.loss(model(batch.inputs), {name: batch.present[name] for name in encoders}).loss.backward()
            optimizer.step()
            if not (steps := steps - 1):
                model.eval()
                return
