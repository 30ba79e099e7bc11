"""`RunProgressBar`: how far a training run is, on a terminal."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities import rank_zero_only

from mmrep.modules.monitoring.model_line import model_line
from mmrep.modules.monitoring.throughput import Throughput

EVERY = 0.5
"""Seconds between two looks at the figures: to read a loss is to wait for the GPU."""
SHOWN = {"train/loss": "loss", "val/loss": "val"}


class RunProgressBar(RichProgressBar):
    """Lightning's bar of an epoch, with the rates and the time left of the whole run in place of those of the epoch.

    Args:
        throughput: Knows the rates; a callback of the same trainer, before this one.
        console_kwargs: Of rich's console.
    """

    def __init__(self, throughput: Throughput, console_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(refresh_rate=10, console_kwargs=console_kwargs)
        self.throughput = throughput
        self._last, self._figures = 0.0, dict[str, str]()

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        print(model_line(pl_module), flush=True)

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Epoch, bar, batches: without Lightning's two columns of time and speed."""
        columns: list[Any] = super().configure_columns(trainer)
        return columns[:3] if trainer.state.fn == "fit" else columns

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        if time.monotonic() - self._last >= EVERY:
            known = trainer.progress_bar_metrics
            figures = {short: f"{known[name]:.3f}" for name, short in SHOWN.items() if name in known}
            if self.throughput.pace is not None:
                figures |= self.throughput.pace.describe(trainer.estimated_stepping_batches - trainer.global_step)
            self._last, self._figures = time.monotonic(), figures
        return dict(self._figures)
