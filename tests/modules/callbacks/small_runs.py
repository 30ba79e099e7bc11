"""Small runs for the tests of callbacks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from mmrep.data.datamodule import ShardDataModule
from mmrep.encoders import ConvImageEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.modules import PairwiseCLIP
from mmrep.modules.callbacks.evaluation import EvaluationCallback

ENCODERS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32, drop=0.2),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8),
}


def module(encoders: dict[str, Any] = ENCODERS, **options: Any) -> PairwiseCLIP:
    """The same weights at each call, and the same random numbers after it."""
    pl.seed_everything(1, verbose=False)
    return PairwiseCLIP(encoders, embed_dim=8, **{"lr": 1e-2, "warmup_steps": 1, **options})


def data(shards: Path, **options: Any) -> ShardDataModule:
    return ShardDataModule(str(shards), **{"global_batch_size": 16, "num_workers": 0, **options})


def trainer(folder: Path, epochs: int, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saves = any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks)
    quiet |= {"enable_checkpointing": saves, "default_root_dir": folder, "num_sanity_val_steps": 0}
    return pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options})


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[dict[str, Any]]:
    """What a trainer must be told in one of the processes of a pool, which a launcher seems to have started."""
    launcher = {"TORCHELASTIC_RUN_ID": "1", "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world}
    launcher |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launcher.items():
            patch.setitem(os.environ, name, str(value))
        yield {"devices": world, "strategy": "ddp", "use_distributed_sampler": False}


def weights(of: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class SaveAt(pl.Callback):
    """Saves a checkpoint after a step, or in the middle of a validation."""

    def __init__(self, path: Path, *, step: int | None = None, validation: int | None = None) -> None:
        self.path, self.step, self.validation = path, step, validation

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.validation:
            trainer.save_checkpoint(self.path)


class Scripted(EvaluationCallback):
    """Logs figures that a test thought of, one an epoch in which it is due."""

    def __init__(self, values: Sequence[float], every_n_epochs: int = 1, name: str = "scripted") -> None:
        super().__init__(name, every_n_epochs)
        self.values = list(values)

    def figures(self) -> list[str]:
        return ["acc1"]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.due(trainer):
            self.log_figures(pl_module, {"acc1": self.values[trainer.current_epoch // self.every_n_epochs]})
