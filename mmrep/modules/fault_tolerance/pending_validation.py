"""A checkpoint written before or inside a validation goes on with that validation."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

NOT_BEGUN = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
"""Of a validation loop: in its first batch, so that it begins anew."""


class PendingValidation(Callback):
    """Mends the place in the loops that Lightning saves when a validation is due.

    A checkpoint of the last step of an epoch, or of a signal inside the validation, would else skip the validation when the
    run goes on: its figures would be missing, and a best checkpoint by them.
    """

    def __init__(self) -> None:
        self._evaluating = False
        self._max_steps: int | None = None  # of a run of which nothing but the last validation is to come

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        fit = checkpoint.get("loops", {}).get("fit_loop", {})
        validation = fit.get("epoch_loop.val_loop.batch_progress", {}).get("current", {})
        last = trainer.state.fn == "fit" and 0 < trainer.max_steps <= checkpoint["global_step"]
        self._max_steps = trainer.max_steps if last and validation == NOT_BEGUN else None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the loops although ``max_steps`` are done; they train nothing before the validation."""
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps = sys.maxsize

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluating = True
        if self._max_steps is not None and not trainer.sanity_checking:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the callbacks that evaluate here, which come before this one."""
        self._evaluating = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.sanity_checking or "loops" not in checkpoint:
            return
        loop = trainer.fit_loop.epoch_loop
        if not (self._evaluating if trainer.validating else _due(loop, trainer)):
            return
        fit = checkpoint["loops"]["fit_loop"]
        batches = fit["epoch_loop.batch_progress"]
        for counts in ("total", "current"):
            batches[counts] = {**batches[counts], "completed": batches[counts]["processed"]}
        fit["epoch_loop.val_loop.batch_progress"] = {
            "total": dict(NOT_BEGUN),
            "current": dict(NOT_BEGUN),
            "is_last_batch": False,
        }


def _due(loop: Any, trainer: pl.Trainer) -> bool:
    """Whether the batch at hand has trained and a validation follows it."""
    progress = loop.batch_progress.current
    fetcher = trainer.fit_loop._data_fetcher
    return progress.completed < progress.processed and fetcher is not None and bool(loop._should_check_val_fx(fetcher))
