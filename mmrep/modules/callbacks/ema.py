"""`EMA`: an exponential moving average of the weights, which is validated, kept and saved in their place."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn

from mmrep.errors import ConfigError
from mmrep.modules.callbacks.averages import Averages

CURRENT, STATE = "current_model_state", "averaging_state"
"""Where a checkpoint keeps the weights that are trained, as with Lightning's `WeightAveraging`, beside the averages."""


class EMA(WeightAveraging):
    """``average = decay * average + (1 - decay) * weights`` after a step (Polyak and Juditsky 1992).

    Validation, with all its callbacks, is of the averages; so are the ``state_dict`` of a checkpoint, what `mmrep.load` makes
    of it, and the ``model/`` of the run. Training goes on with its own weights, which a checkpoint keeps beside them.

    It writes the checkpoints of Lightning's `WeightAveraging` and differs in what that does: it copies nothing that is not
    averaged, keeps the averages on the device of the weights, leaves integers and queues alone, follows the weights until
    ``start_step``, holds the averages until all of a validation is done, and stops no run by a checkpoint without averages.

    It costs the memory of the trained weights once more, and in a step a read and a write of both. Averages are equal on all
    ranks, as weights are; the statistics of a pretrained backbone's BatchNorm are those of each rank, as they are without it.

    Args:
        decay: Of the average, for each update.
        every_n_steps: Optimiser's steps from one update to the next.
        start_step: Until this step of the optimiser the averages are the weights.
        warmup: Whether the decay rises with the number n of updates, as ``min(decay, (1 + n) / (10 + n))`` (TensorFlow's
            ``ExponentialMovingAverage``): for runs that are short against ``1 / (1 - decay)`` steps.
        device: Where the averages are; by default with the weights. ``cpu`` saves memory of the GPU and costs a copy a step.

    Raises:
        ConfigError: On impossible values.

    Example:
        In a config::

            trainer:
              callbacks:
                - class_path: mmrep.modules.callbacks.EMA
                  init_args: {decay: 0.999, warmup: true}
    """

    def __init__(
        self,
        decay: float = 0.9999,
        every_n_steps: int = 1,
        start_step: int = 0,
        *,
        warmup: bool = False,
        device: str | None = None,
    ) -> None:
        super().__init__(device=device)
        if not 0 <= decay < 1 or every_n_steps < 1 or start_step < 0:
            raise ConfigError(
                f"decay={decay} must be in [0, 1), every_n_steps={every_n_steps} at least 1, "
                f"start_step={start_step} at least 0",
                where="EMA",
            )
        self.decay, self.every_n_steps, self.start_step, self.warmup = decay, every_n_steps, start_step, warmup
        self.averages: Averages | None = None

    def decay_at(self, step: int) -> float | None:
        """The decay after a step of the optimiser, counted from 1; None where there is no update."""
        if step <= self.start_step:
            return 0.0
        updates, rest = divmod(step - self.start_step, self.every_n_steps)
        if rest:
            return None
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            others = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]  # a list
            if len(others) > 1:
                raise ConfigError("two callbacks average the weights", where="trainer.callbacks", fix="leave one out")
            self.averages = Averages(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the weights to their device, which they have reached only now."""
        averages = self._made()
        averages.check(pl_module)
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "save_weights_only", False):  # Lightning asks no callback about such a checkpoint
                raise ConfigError(
                    "a checkpoint of weights alone would hold those that are trained, and not their averages",
                    where="checkpoint.save_weights_only",
                    fix="leave it out; the run's model/ holds the averages alone",
                )
        averages.to(pl_module.device if self._device is None else torch.device(self._device))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_update_step:  # a step of the optimiser, and not a part of its accumulated batch
            self._latest_update_step = step
            decay = self.decay_at(step)
            if decay is not None:
                self._made().update(pl_module, decay)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: updates are counted in steps."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._made().swap(pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: the averages are there since `on_validation_start`."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: other callbacks and the module evaluate here, in any order; `on_validation_end` comes after all of them."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._made().swap(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the averages in the module; a checkpoint that is written after this still has both."""
        self._made().swap(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where nothing was left to train."""
        averages = self._made()
        if not averages.swapped:
            averages.swap(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.averages is not None:
            checkpoint["state_dict"], checkpoint[CURRENT] = self.averages.states(checkpoint["state_dict"])
            checkpoint[STATE] = {"n_averaged": torch.tensor(self._latest_update_step)}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up both; elsewhere than in training the averages, which Lightning has loaded already, are all that counts."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        averages = checkpoint["state_dict"]
        weights = checkpoint.get(CURRENT, averages)
        if CURRENT in checkpoint:
            pl_module.load_state_dict(weights)
        else:
            rank_zero_warn("the checkpoint was made without EMA: the averages begin with its weights")
        self._made().load(averages, weights)

    def _made(self) -> Averages:
        assert self.averages is not None, "made when a fit is set up"
        return self.averages
