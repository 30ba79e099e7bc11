"""A checkpoint every so many minutes, beside those by epochs, steps or figures."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

TIMED = "timed.ckpt"


class TimedCheckpoint(Callback):
    """Bounds what a sudden end costs. Each checkpoint takes the place of the one before.

    The first rank's clock decides; that a checkpoint is due travels with the loss, where Lightning's own
    ``train_time_interval`` costs a broadcast in every step.

    Args:
        folder: For the checkpoint, `TIMED`.
        interval: Between two of them.
    """

    def __init__(self, folder: Path, interval: timedelta) -> None:
        self.folder, self.interval = folder, interval.total_seconds()
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.save_asked = trainer.is_global_zero and time.monotonic() - self._last >= self.interval

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.save_agreed and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.folder / TIMED, weights_only=False)
            pl_module.save_agreed, self._last = False, time.monotonic()
