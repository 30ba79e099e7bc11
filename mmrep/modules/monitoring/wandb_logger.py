"""`OfflineSafeWandbLogger`: Weights & Biases for a run that no lost network may stop."""

from __future__ import annotations

import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from mmrep.files import replacing

ID_FILE = "wandb_run_id.txt"
"""In the run folder: a run that goes on is the same run at wandb."""
TIMEOUTS = {"init_timeout": 20.0, "finish_timeout": 60.0, "login_timeout": 20.0}
"""Seconds that wandb may take to begin a run, to send what is left at its end, and to ask for a key on a terminal.
``WANDB_INIT_TIMEOUT`` and the like go before."""

PATIENCE = 2.0
"""Seconds that the training waits for a table to be sent; after that it goes on, and the table is sent beside it."""


class OfflineSafeWandbLogger(WandbLogger):
    """Lightning's logger, but for what fails: a run that cannot begin online begins offline, and nothing it logs raises.

    What wandb writes lies in ``RUN/wandb`` in either case, for ``wandb sync``.

    Args:
        folder: Of the run; its name is the run's.
        project: At wandb.
    """

    def __init__(self, folder: Path, project: str) -> None:
        self.folder = folder
        self._warned = False
        self._sender: threading.Thread | None = None
        super().__init__(name=folder.name, project=project, save_dir=folder)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it, even where it is not used

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run at wandb; on other ranks than the first something that does nothing."""
        if self._experiment is None:
            self._experiment = self._begin()
            self._surviving(lambda: _define_steps(self._experiment))
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._surviving(lambda: super(OfflineSafeWandbLogger, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_config(self, config: dict[str, Any]) -> None:
        """The resolved config of the run."""
        self._surviving(lambda: self.experiment.config.update(config, allow_val_change=True))

    @rank_zero_only
    def log_page(self, name: str, html: str) -> None:
        """A page of HTML."""
        self._surviving(lambda: _log_html(self.experiment, name, html))

    @rank_zero_only
    def log_rows(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], html: str) -> None:
        """A `wandb.Table`, or ``html`` in its place: for a table wandb asks its server first, and may wait for it.

        Args:
            name: Under which it is shown.
            columns: Names.
            rows: Values.
            html: The same as a page.
        """
        self._surviving(lambda: self._log_rows(self.experiment, name, columns, rows, html))

    def _log_rows(self, run: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], html: str) -> None:
        def send() -> None:
            try:
                _log_table(run, name, columns, rows)
            except Exception:
                self._surviving(lambda: _log_html(run, name, html))

        if self._waits(0):
            _log_html(run, name, html)
            return
        self._sent, self._sender = (name, html), threading.Thread(target=send, daemon=True)
        self._sender.start()
        self._waits()

    def _waits(self, patience: float = PATIENCE) -> bool:
        """Whether a table is still on its way, after so many seconds."""
        if self._sender is not None:
            self._sender.join(patience)
        return self._sender is not None and self._sender.is_alive()

    @rank_zero_only
    def preempted(self) -> None:
        """The run was told to stop, and will go on: wandb then shows it as preempted, and not as failed."""
        if self._experiment is not None:
            self._surviving(self._experiment.mark_preempting)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send what is left, but no longer than the time-out."""
        if self._experiment is not None:
            run: Any = self._experiment
            if self._waits():
                self._surviving(lambda: _log_html(run, *self._sent))
            self._surviving(lambda: run.finish(exit_code=0 if status == "success" else 1))
            self._experiment = None

    def _begin(self) -> Any:
        import wandb

        self._wandb_init["id"] = self._id = self._run_id()
        timeouts: dict[str, Any] = {
            name: value for name, value in TIMEOUTS.items() if f"WANDB_{name.upper()}" not in os.environ
        }
        settings = wandb.Settings(**timeouts)
        try:
            return wandb.init(**self._wandb_init, settings=settings)
        except Exception as error:
            self._warn(f"wandb cannot be reached ({first_line(error)})")
            with suppress(Exception):
                wandb.teardown()  # a run that did not begin would hold its id
        try:
            return wandb.init(**self._wandb_init, settings=settings, mode="offline")
        except Exception:
            return wandb.init(mode="disabled")

    def _run_id(self) -> str:
        path = self.folder / ID_FILE
        if not path.is_file():
            with replacing(path) as part:
                part.write_text(uuid.uuid4().hex[:8] + "\n")
        return path.read_text().strip()

    def _surviving(self, log: Callable[[], None]) -> None:
        try:
            log()
        except Exception as error:  # whatever wandb and its service process may meet: the run is worth more
            self._warn(f"wandb failed ({first_line(error)})")

    def _warn(self, what: str) -> None:
        said, self._warned = self._warned, True
        if not said:
            after = f"the run goes on, afterwards: wandb sync {self.folder / 'wandb'}/*run-*"
            print(f"mmrep: warning: {what}; {after}", file=sys.stderr)


def _define_steps(run: Any) -> None:
    """Figures are drawn over the steps."""
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)


def _log_table(run: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    import wandb

    run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})


def _log_html(run: Any, name: str, html: str) -> None:
    import wandb

    run.log({name: wandb.Html(html, inject=False)})


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
