"""`DiskSafeTensorBoardLogger`: TensorBoard for a run that no full disk may stop."""

from __future__ import annotations

import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

PAUSE = 60.0
"""Seconds from a write that failed to the next: each begins a file."""


class DiskSafeTensorBoardLogger(TensorBoardLogger):
    """Lightning's logger, except that a full disk ends no training: what finds no room is left out, and said once.

    A writer of events is of no use after its first error: its thread has ended. Later there is a new one, with a file of
    its own; TensorBoard shows all files of a folder as one run.
    """

    _warned, _next = False, 0.0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._surviving(lambda: super(DiskSafeTensorBoardLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        self._surviving(lambda: super(DiskSafeTensorBoardLogger, self).log_hyperparams(params, metrics, step))

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        """A text in Markdown."""
        self._surviving(lambda: self.experiment.add_text(name, text, step))

    @rank_zero_only
    def save(self) -> None:
        self._surviving(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._surviving(lambda: super(DiskSafeTensorBoardLogger, self).finalize(status))

    def _surviving(self, log: Callable[[], None]) -> None:
        if time.monotonic() < self._next:
            return
        _silence_writers()
        try:
            log()
        except (OSError, ValueError) as error:  # Lightning makes a ValueError of all that a metric meets
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            self._give_up(cause)

    def _give_up(self, error: OSError) -> None:
        """Of the writer: the next is tried after a pause."""
        self._experiment, self._next = None, time.monotonic() + PAUSE
        with suppress(OSError):
            for path in Path(self.log_dir).glob("events.out.tfevents.*"):
                if not path.stat().st_size:
                    path.unlink()
        said, self._warned = self._warned, True
        if not said:
            reason = error.strerror or error
            print(
                f"mmrep: warning: TensorBoard's events cannot be written ({reason}) [{self.log_dir}]", file=sys.stderr
            )


@cache
def _silence_writers() -> None:
    """The logger tells what a thread that writes events has met; from here on Python prints no traceback of it."""
    others = threading.excepthook

    def hook(met: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(met.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(met.exc_value, OSError)):
            others(met)

    threading.excepthook = hook
