"""SIGTERM, SIGUSR1 and Ctrl-C end a run at the next step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

from mmrep.data.worker_signals import SIGNALS
from mmrep.modules.fault_tolerance.checkpoint_io import DurableCheckpointIO
from mmrep.ops.gather import sum_over_ranks

TWICE = 2.0
"""Seconds within which a launcher's Ctrl-C and the terminal's own count as one."""
STOPPED = "stopped.ckpt"


class PreemptedError(Exception):
    """The run has stopped because it was told to. Its text says where the checkpoint is and how to go on."""


class StopSignals:
    """Notes the signals that ask a process to stop, from `listen` on.

    A launcher and the terminal may both send a signal, so a repeated one changes nothing. Only a second Ctrl-C after a while
    stops at once.

    Attributes:
        received: Name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._launcher: Any = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether there was one."""
        return self.received is not None

    def listen(self) -> None:
        """Take the signals over. Python allows it in the main thread only; elsewhere nothing changes."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def take_over(self, trainer: pl.Trainer) -> None:
        """Keep Lightning from answering signals itself.

        Its handler of SIGTERM runs a collective inside the handler, at whatever point of a step, ends without a checkpoint, and
        needs a broadcast in every step.
        """
        self._launcher = trainer.strategy.launcher
        trainer._signal_connector = _NoSignals(trainer)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self._when = name, time.monotonic()
            # Not print: a signal may come in the middle of one.
            os.write(2, f"mmrep: {name}: stops after this step, with a checkpoint\n".encode())
            if self._launcher is not None:  # the processes that Lightning started for the other devices
                self._launcher.kill(number)
        elif number == signal.SIGINT and time.monotonic() - self._when > TWICE:
            os.write(2, b"mmrep: a second Ctrl-C: stops now, without a checkpoint\n")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt


class Preemption(Callback):
    """Writes a checkpoint at the step after a signal, on all ranks at the same step, and raises `PreemptedError`.

    Whether a rank was told to stop travels with the loss, which is summed over the ranks in any case: a signal to one of
    them stops all. In an evaluation the batch is the step; the evaluation begins anew when the run goes on.

    Args:
        signals: Those of this process.
        folder: For the checkpoint, `STOPPED`.
    """

    def __init__(self, signals: StopSignals, folder: Path) -> None:
        self.signals, self.folder = signals, folder
        self._first_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        asked = torch.tensor(int(self.signals.asked()), device=trainer.strategy.root_device)
        if stage == "fit" and int(sum_over_ranks(asked)):
            raise PreemptedError(told("before the first step", None))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.stop_asked = self.signals.asked()

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.stop_asked = self.signals.asked()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.stop_agreed and not trainer.fit_loop._should_accumulate():
            for metrics in (
                trainer._logger_connector.on_batch_end,
                trainer._logger_connector.update_train_step_metrics,
            ):
                metrics()  # of this step, which is not done again
            self._leave(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if pl_module.stop_agreed and trainer.state.fn == "fit":
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets the list without declaring it
                if isinstance(callback, WeightAveraging):  # the module has the averages for now
                    callback.on_validation_epoch_end(trainer, pl_module)
            self._leave(trainer)

    def between_batches(self, trainer: pl.Trainer) -> None:
        """The same in an evaluation of a callback's own: a collective, called by every rank at the same batches.

        Not beside Lightning's own weight averaging, which does not tell whether the module holds the averages for now: the
        next step stops that run.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets the list without declaring it
        averaging = any(isinstance(other, WeightAveraging) and other._average_model is not None for other in callbacks)
        if trainer.state.fn != "fit" or averaging:
            return
        asked = torch.tensor(int(self.signals.asked()), device=trainer.strategy.root_device)
        if int(sum_over_ranks(asked)):
            self._leave(trainer)

    def _leave(self, trainer: pl.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by one of Lightning's connectors
            raise PreemptedError("stopped: a dry run writes no checkpoint")
        if trainer.global_step == self._first_step:
            raise PreemptedError(told("before the first step", None))
        path = self.folder / STOPPED
        trainer.save_checkpoint(path, weights_only=False)
        checkpoints = trainer.strategy.checkpoint_io
        if isinstance(checkpoints, DurableCheckpointIO):
            checkpoints.check()
        raise PreemptedError(told(f"after step {trainer.global_step}", path))


class _NoSignals(_SignalConnector):
    def register_signal_handlers(self) -> None:
        """They are `StopSignals`'s."""


def _nothing() -> None:
    """In place of a broadcast."""


def told(when: str, path: Path | None) -> str:
    place = f"; checkpoint in {path}" if path else ""
    return f"stopped {when}{place}; the same command with --resume auto goes on"
