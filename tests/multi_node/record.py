"""Callbacks that a config names: what each rank saw, and a rank that dies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmrep.batch import Batch


class RecordKeys(Callback):
    """Appends the keys of every training batch to a file of this rank.

    Args:
        folder: Where ``rank0.jsonl`` and so on go.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, i: int) -> None:
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(batch.keys) + "\n")


class Die(Callback):
    """SIGKILL for one rank as a step begins, unless the launcher has started the run again.

    Args:
        step: Steps done by then.
        rank: Which one dies.
    """

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, i: int) -> None:
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not again:
            os.kill(os.getpid(), signal.SIGKILL)


def read_keys(folder: Path, ranks: int) -> list[list[str]]:
    """The keys of each step over all ranks, in rank order."""
    shares = [(folder / f"rank{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    return [[key for part in parts for key in json.loads(part)] for parts in zip(*shares, strict=True)]
