"""A checkpoint between the parts of an accumulated step keeps the gradients of the parts before it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from mmrep.ops.gather import sum_over_ranks, world_size

KEY = "mmrep_accumulated_gradients"


class AccumulatedGradients(Callback):
    """Saves and restores what ``accumulate_grad_batches`` has gathered of a step.

    Such a checkpoint is written where a validation ends inside a step, or by hand. Each rank holds the gradients of its own
    samples until the last part; their mean is kept, which gives the same step on any number of ranks. With one
    rank it is the same bit by bit, with several to rounding: the parts are summed over the ranks in another order.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Tensor] = {}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not trainer.fit_loop._should_accumulate():
            return
        checkpoint[KEY] = {
            name: sum_over_ranks(parameter.grad) / world_size()
            for name, parameter in pl_module.named_parameters()
            if parameter.grad is not None  # on all ranks alike: every parameter is in the graph, or frozen
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get(KEY, {}) if trainer.state.fn == "fit" else {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            if name in self._restored:
                parameter.grad = self._restored[name].to(parameter.device, parameter.dtype)
        self._restored = {}
