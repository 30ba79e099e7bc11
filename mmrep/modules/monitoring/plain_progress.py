"""`PlainProgress`: how far a training run is, where there is no terminal to draw a bar on."""

from __future__ import annotations

import math
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from mmrep.modules.monitoring.model_line import model_line
from mmrep.modules.monitoring.throughput import Throughput

SHOWN = ("train/loss", "val/loss")


class PlainProgress(Callback):
    """Prints a line per epoch, and at most one per ``interval`` seconds within it.

    Args:
        throughput: Knows the rates; a callback of the same trainer, before this one.
        interval: Seconds between two lines of one epoch.
    """

    def __init__(self, throughput: Throughput, interval: float = 30.0) -> None:
        self.throughput, self.interval = throughput, interval
        self._last = 0.0

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print(model_line(pl_module), flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if (
            time.monotonic() - self._last > self.interval and not trainer.is_last_batch
        ):  # the epoch's own line comes next
            self._line(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer)

    @rank_zero_only
    def _line(self, trainer: pl.Trainer) -> None:
        self._last = time.monotonic()
        total = float(trainer.estimated_stepping_batches)
        of = f"/{total:.0f}" if math.isfinite(total) else ""
        words = [f"epoch {trainer.current_epoch}", f"step {trainer.global_step}{of}"]
        metrics = trainer.callback_metrics
        words += [f"{name} {float(metrics[name]):.3f}" for name in SHOWN if name in metrics]
        if self.throughput.pace is not None:
            for name, value in self.throughput.pace.describe(total - trainer.global_step).items():
                words.append(f"{value} {name}" if name == "samples/s" else f"{name} {value}")
        print("  ".join(words), flush=True)
