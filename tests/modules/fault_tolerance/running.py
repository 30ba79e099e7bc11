"""Small runs that a fault ends and that go on: what starts them, and what compares them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmrep.cli.resume import newest_intact
from mmrep.evaluation.curves import read_curves
from mmrep.modules.fault_tolerance import watchdog
from tests.launched import launch, read

EPOCHS, STEPS = 3, 18
ENCODERS = {
    "image": {"class_path": "mmrep.encoders.ConvImageEncoder", "init_args": {"image_size": 16, "width": 8}},
    "text": {"class_path": "mmrep.encoders.NgramTextEncoder", "init_args": {"width": 16, "buckets": 512}},
}


def write_config(folder: Path, shards: Path, **more: Any) -> Path:
    """A run of two modalities, six steps an epoch, that records what it sees in ``seen`` beside the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = {"class_path": "tests.launched.Recorder", "init_args": {"folder": str(folder / "seen")}}
    config: dict[str, Any] = {
        "model": {
            "class_path": "mmrep.modules.PairwiseCLIP",
            "init_args": {"embed_dim": 8, "lr": 5e-3, "warmup_steps": 2, "encoders": ENCODERS},
        },
        "data": {"path": str(shards), "global_batch_size": 8, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "max_epochs": EPOCHS, "callbacks": [recorder], "num_sanity_val_steps": 0},
        "runs": str(folder / "runs"),
        "name": "run",
    }
    for path, value in more.items():
        part = config
        *sections, last = path.split("__")
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def fit(folder: Path, *options: str, world: int = 2, before: Any = (), timeout: float = 120.0) -> Any:
    """One start of the run, to its end."""
    arguments = ["fit", "--config", str(folder / "config.yaml"), *options]
    ranks = launch(arguments, folder / "logs", world, before)
    ranks.wait(timeout)
    return ranks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / "run" / "model" / "model.safetensors")


def assert_same(folder: Path, whole: Path) -> None:
    """The samples of every batch, their order, and all weights are those of the run that nothing stopped."""
    seen, expected = read(folder / "seen"), read(whole / "seen")
    assert seen == expected
    found = weights(folder)
    for name, tensor in weights(whole).items():
        assert torch.equal(found[name], tensor), name
    assert_same_curves(folder, whole)


def assert_same_curves(folder: Path, whole: Path) -> None:
    """Every figure of every step, those of validations too."""
    found, expected = (read_curves(place / "runs" / "run") for place in (folder, whole))
    for name, curve in expected.items():
        if name.startswith(("train/loss", "val/")):
            assert found[name] == curve, name


def newest_step(folder: Path) -> int:
    """Steps of the newest checkpoint, as a resume would find it."""
    path = newest_intact(folder / "runs" / "run" / "checkpoints")
    return -1 if path is None else int(torch.load(path, weights_only=True, mmap=True)["global_step"])


MOMENTS = ("start", "gradients", "end", "writing", "written")


def small_disk(folder: Path) -> None:
    """A file system of 3 MB."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")


def fill(folder: Path) -> None:
    """Take all room that is left."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                pass


def impatient() -> None:
    """The watch in a tenth of its time."""
    watchdog.PERIOD, watchdog.GRACE, watchdog.WAY_OUT = 0.5, 3.0, 5.0


def both(*functions: Any) -> Any:
    return lambda: [function() for function in functions]
