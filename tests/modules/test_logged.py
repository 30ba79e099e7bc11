"""Several figures at a time are those of Lightning's own `log`, at every step and over every epoch, and cost one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import mmrep.modules.base
import mmrep.modules.monitoring.throughput
from mmrep.data.datamodule import ShardDataModule
from mmrep.encoders import ConvImageEncoder, NgramTextEncoder
from mmrep.modules import PairwiseCLIP
from mmrep.modules.monitoring.throughput import Throughput

ENCODERS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
}
TIMED = ("train/samples_per_second", "train/data_wait_share")


class Look(pl.Callback):
    """Keeps all figures after every step, and what was logged through Lightning in it."""

    def __init__(self) -> None:
        self.figures: list[dict[str, float]] = []
        self.calls: list[list[str]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.calls.append([])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.figures.append({n: float(v) for n, v in trainer.callback_metrics.items() if n not in TIMED})

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.on_train_batch_end(trainer)


def fit(shards: Path) -> Look:
    torch.manual_seed(0)
    look = Look()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=3,
        log_every_n_steps=2,
        callbacks=[Throughput(), look],
    )
    module = PairwiseCLIP(ENCODERS, embed_dim=8, warmup_steps=1)
    log = module.log

    def noted(name: str, *args: Any, **options: Any) -> None:
        if look.calls:
            look.calls[-1].append(name)
        log(name, *args, **options)

    module.log = noted  # type: ignore[method-assign,assignment]
    trainer.fit(module, ShardDataModule(str(shards), global_batch_size=16, num_workers=0))
    return look


def one_by_one(module: pl.LightningModule, figures: Mapping[str, Any], batch_size: int = 1, **_: Any) -> None:
    for name, value in figures.items():
        module.log(name, value, batch_size=batch_size)


def test_figures_are_bit_for_bit_those_of_lightning_s_log(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = fit(tiny_shards)
    for place in (mmrep.modules.base, mmrep.modules.monitoring.throughput):
        monkeypatch.setattr(place, "log_figures", one_by_one)
    each = fit(tiny_shards)
    assert len(together.figures) == 12 and together.figures == each.figures
    assert {"train/logit_scale", "train/loss/image-text", "train/gradient_norm", "train/uniformity/text"} < set(
        together.figures[1]
    )
    assert {"val/loss", "val/loss/image-text", "val/uniformity/text"} < set(together.figures[-1])
    assert together.calls[4] == ["train/loss"] and together.calls[3] == ["train/loss", "train/samples_per_second"]
    assert len(each.calls[4]) == 4 and len(each.calls[3]) > 8
