"""How ``mmrep fit`` is seen: its loggers, its progress, its report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pydoc import locate
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import Logger

from mmrep.cli.run_folder import RunFolder
from mmrep.errors import ConfigError
from mmrep.modules.monitoring.metrics_file import MetricsFile
from mmrep.modules.monitoring.plain_progress import PlainProgress
from mmrep.modules.monitoring.progress_bar import RunProgressBar
from mmrep.modules.monitoring.run_media import RunMedia
from mmrep.modules.monitoring.tensorboard_logger import DiskSafeTensorBoardLogger
from mmrep.modules.monitoring.throughput import Throughput
from mmrep.modules.monitoring.throughput_report import lines
from mmrep.modules.monitoring.wandb_logger import OfflineSafeWandbLogger


class Watching:
    """What is added to a trainer.

    Args:
        options: Of the subcommand.
        subcommand: ``fit`` or another.
        folder: Of the run.
    """

    def __init__(self, options: Namespace, subcommand: str, folder: RunFolder) -> None:
        self.options, self.fitting, self.folder = options, subcommand == "fit", folder.path
        self.stage = "" if self.fitting else subcommand
        self.dry = bool(options.trainer.fast_dev_run)
        for wanted, package in ((options.wandb, "wandb"), (options.tensorboard, "tensorboard")):
            if wanted and find_spec(package) is None:
                raise ConfigError(f"--{package} needs {package}", fix=f"pip install 'mmrep[{package}]'")
        self.throughput = Throughput(self.folder / "throughput.json" if self.fitting and not self.dry else None)
        self._earlier_report = self._report_written()
        self.own_bar = any(issubclass(named, ProgressBar) for named in _classes(options.trainer.callbacks))

    def trainer_options(self) -> dict[str, Any]:
        """What goes into the trainer's constructor."""
        chosen = self.options.trainer
        given: dict[str, Any] = {}
        if not self.dry and not self._own_loggers:
            given["logger"] = self._loggers()
        if self._shows_progress:
            given["enable_progress_bar"] = False
        if chosen.enable_model_summary is None:
            given["enable_model_summary"] = (
                False  # of one module, "model"; the progress begins with a line that says more
            )
        return given

    def add_to(self, trainer: pl.Trainer) -> None:
        """Add callbacks, and the loggers that the config does not name: metrics.csv is always written."""
        if not self.dry and self._own_loggers:
            # Ours first: Lightning puts config.yaml where the first one writes.
            trainer.loggers = [*self._loggers(), *trainer.loggers]
        extra: list[Callback] = []
        if self.fitting:
            extra.append(self.throughput)
            if not self.dry and (self.options.wandb or self.options.tensorboard):
                extra.append(RunMedia(self.folder))
        if self._shows_progress:
            bar = self.options.trainer.enable_progress_bar or sys.stderr.isatty()
            extra.append(RunProgressBar(self.throughput) if bar else PlainProgress(self.throughput))
        trainer.callbacks.extend(extra)  # type: ignore[attr-defined]  # Lightning sets the list without declaring it

    def print_report(self) -> None:
        """The throughput of the training that ended, in this process or in those that the strategy has started."""
        report, path = self.throughput.report, self.throughput.path
        if report is None and path is not None and self._report_written() not in (None, self._earlier_report):
            report = json.loads(path.read_text())
        if report is not None:
            print(lines(report))

    def _report_written(self) -> int | None:
        """When the report in the run folder was written; None where there is none."""
        path = self.throughput.path
        return path.stat().st_mtime_ns if path is not None and path.is_file() else None

    @property
    def _shows_progress(self) -> bool:
        """Whether the progress is ours to show: neither forbidden nor shown by a bar that the config names."""
        return self.options.trainer.enable_progress_bar is not False and not self.own_bar

    @property
    def _own_loggers(self) -> bool:
        return self.options.trainer.logger not in (None, True, False)

    def _loggers(self) -> list[Logger]:
        folder = self.folder
        loggers: list[Logger] = [
            MetricsFile(folder.parent, name=folder.name, version=self.stage, flush_logs_every_n_steps=20)
        ]
        if self.options.tensorboard:
            loggers.append(DiskSafeTensorBoardLogger(folder, name="tensorboard", version=self.stage))
        if self.options.wandb:
            loggers.append(OfflineSafeWandbLogger(folder, self.options.project))
        return loggers


def _classes(callbacks: Any) -> Iterable[type]:
    """Of the callbacks that a config names: none, one or a list."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        found = locate(str(getattr(callback, "class_path", "")))
        if isinstance(found, type):
            yield found
