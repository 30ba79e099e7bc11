"""Progress of a training run where there is no terminal to draw a bar on."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only


class PlainProgress(Callback):
    """Prints a line per epoch, and at most one per ``interval`` seconds within it.

    Args:
        interval: Seconds between two lines of one epoch.
    """

    def __init__(self, interval: float = 30.0) -> None:
        self.interval = interval
        self._start = self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if time.monotonic() - self._last > self.interval:
            self._line(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer)

    @rank_zero_only
    def _line(self, trainer: pl.Trainer) -> None:
        self._last = time.monotonic()
        done = trainer.global_step - self._first_step
        rate = done / max(1e-9, self._last - self._start)
        total = trainer.estimated_stepping_batches
        left = f"  ETA {(total - trainer.global_step) / rate:.0f} s" if rate and total != float("inf") else ""
        shown = ("train/loss", "val/loss")
        figures = "".join(
            f"  {name} {float(trainer.callback_metrics[name]):.3f}"
            for name in shown
            if name in trainer.callback_metrics
        )
        print(
            f"epoch {trainer.current_epoch}  step {trainer.global_step}/{total}{figures}  {rate:.1f} steps/s{left}",
            flush=True,
        )
