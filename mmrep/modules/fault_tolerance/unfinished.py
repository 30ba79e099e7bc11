"""A run that goes on has no model yet: ``model/`` says that a run is complete."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmrep.files import set_aside


class Unfinished(Callback):
    """Sets the model of an earlier end aside, once there is a step to train.

    A script that starts a run until it is complete asks for ``model/``; one of fewer epochs would mislead it.

    Args:
        model: The folder.
    """

    def __init__(self, model: Path) -> None:
        self.model = model

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            set_aside(self.model)
