"""Picture, text, sound, series and table in one run through shards, each of them missing in many samples."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from mmrep.data.build import build_index
from mmrep.data.datamodule import ShardDataModule
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Modality
from mmrep.data.reader import Samples
from mmrep.data.writer import write_shard
from mmrep.encoders import ConvImageEncoder, MelAudioEncoder, NgramTextEncoder, SeriesEncoder, TabularEncoder
from mmrep.interop.load import load
from mmrep.modules import PairwiseCLIP, Symile
from tests.tiny import CLASSES, COLOURS, flac, png

MODALITIES = {
    "image": Modality(("png",), "image"),
    "text": Modality(("txt",), "text"),
    "audio": Modality(("flac",), "audio"),
    "ecg": Modality(("ecg.npy",), "array"),
    "labs": Modality(("labs.npy",), "array"),
}
MISSING = {"image": 3, "text": 4, "audio": 5, "ecg": 3, "labs": 4}
"""Each modality lacks in one of so many samples."""
ENCODERS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8, augment=False),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=16, augment=False),
    "ecg": lambda d: SeriesEncoder(d, channels=2, length=64, width=8, stages=2, random_window=True),
    "labs": lambda d: TabularEncoder(d, size=4, width=16, layers=1, mean=[9.0] * 4, std=[4.0] * 4),
}


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def sample(number: int) -> dict[str, Any]:
    """Of a class: a colour, a word, a tone, a frequency, and levels of which one in five was not measured."""
    label, rng = number % len(CLASSES), np.random.default_rng(number)
    times = np.arange(80) / 64
    ecg = np.stack([np.sin(2 * np.pi * (3 + 4 * label) * times + rng.random()), np.cos(times)])
    labs = np.where(rng.random(4) < 0.2, np.nan, np.array([1, 3, 5, 7]) + 2 * label + rng.normal(scale=0.15, size=4))
    members = {
        "image": ("png", png(COLOURS[label], noise=number)),
        "text": ("txt", f"a {CLASSES[label]} thing {number % 5}"),
        "audio": ("flac", flac(250.0 * 1.5**label, phase=number)),
        "ecg": ("ecg.npy", npy(ecg + rng.normal(scale=0.1, size=ecg.shape))),
        "labs": ("labs.npy", npy(labs)),
    }
    absent = [name for name, every in MISSING.items() if rng.integers(0, every) == 0]
    kept = {extension: content for name, (extension, content) in members.items() if name not in absent}
    return {"__key__": f"s{number:05d}", **(kept or {"txt": members["text"][1]}), "json": {"label": label}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, number = tmp_path_factory.mktemp("five"), 0
    for split, size in (("train", 240), ("val", 48)):
        write_shard(folder / f"{split}-000000.tar", [sample(number + i) for i in range(size)])
        number += size
    build_index(folder, MODALITIES, group_key="label").save()
    return folder


def train(module: Any, shards: Path, folder: Path, epochs: int) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = pl.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, default_root_dir=folder, **quiet)  # type: ignore[arg-type]  # switches
    run.fit(module, ShardDataModule(str(shards), global_batch_size=24, num_workers=0))
    return run


@pytest.mark.parametrize(("module_class", "epochs"), [(PairwiseCLIP, 8), (Symile, 12)])
def test_five_modalities_with_parts_missing(module_class: Any, epochs: int, shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = module_class(ENCODERS, embed_dim=16, lr=1e-2, warmup_steps=5)
    run = train(module, shards, tmp_path, epochs)
    figures = {name: float(value) for name, value in run.callback_metrics.items()}
    joint = {name: figures[f"val/{'+'.join(sorted(set(ENCODERS) - {name}))}->{name}/recall@1"] for name in ENCODERS}
    print("\n" + ", ".join(f"{name} {value:.2f}" for name, value in joint.items()))
    assert min(joint.values()) > 0.4  # any sample of the class is right: chance is 1/6
    if module_class is PairwiseCLIP:
        single = {f"{a}->{b}": figures[f"val/{a}->{b}/recall@1"] for a in ENCODERS for b in ENCODERS if a != b}
        print(", ".join(f"{name} {value:.2f}" for name, value in single.items()))
        assert len(single) == 20 and min(single.values()) > 0.5
    run.save_checkpoint(tmp_path / "five.ckpt")
    again = load(tmp_path / "five.ckpt")
    item = {"ecg": [np.ones((2, 70))], "labs": [np.array([1.0, np.nan, 2.0, 3.0])]}
    one, other = module.model.encode(**item), again.encode(**item)
    assert all(torch.equal(one[name], other[name]) for name in item)


def test_a_batch_without_a_modality_leaves_its_encoder_without_gradient_and_no_nan(shards: Path) -> None:
    module = PairwiseCLIP(ENCODERS, embed_dim=8)
    encoders = module.model.by_modality
    data = ShardDataModule(str(shards), global_batch_size=24, num_workers=0)
    data.setup("fit")
    assert data.index is not None
    dataset = ShardDataset(Samples(data.index, "train"), encoders, global_batch_size=24, train=True)
    batch = next(iter(make_loader(dataset, encoders)))
    assert all(0 < int(mask.sum()) < 24 for mask in batch.present.values())
    present = {**batch.present, "ecg": torch.zeros(24, dtype=torch.bool)}
    module.model.loss(module.model(batch.inputs), present).loss.backward()
    for name, encoder in encoders.items():
        gradients = [p.grad for p in encoder.parameters()]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients), name
        assert any(bool(g.any()) for g in gradients if g is not None) == (name != "ecg")
