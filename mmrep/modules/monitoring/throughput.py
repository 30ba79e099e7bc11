"""`Throughput`: where the time of a training run goes, measured without a change to a number of it."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn.utils import get_total_norm

from mmrep.files import replacing
from mmrep.modules.logged import is_log_step, log_figures
from mmrep.modules.monitoring.clock_profiler import ClockProfiler
from mmrep.modules.monitoring.pace import Pace
from mmrep.modules.monitoring.throughput_report import peak_memory, throughput
from mmrep.ops.gather import gather_stacked, world_size
from mmrep.ops.step_clock import PARTS, REST, VALIDATION, CudaStamps, StepClock, running

Totals = tuple[dict[str, float], int, int]
"""Seconds of each part, samples, optimiser steps."""


class Throughput(pl.Callback):
    """Times the parts of every step, logs rates, and leaves a report over all ranks at the end of the training.

    Every ``log_every_n_steps`` it logs ``train/samples_per_second`` and ``train/data_wait_share`` of the last batches,
    ``train/learning_rate`` (the highest of all parameter groups) and ``train/gradient_norm`` (before clipping).

    Args:
        path: Of the report, a JSON; none is written without.
        warmup_steps: First steps that are in no figure of the report, as they allocate, compile and start processes. A run
            that ends within them is reported with them.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Throughput(Path("throughput.json"))])  # doctest: +SKIP
    """

    def __init__(self, path: Path | None = None, warmup_steps: int = 5) -> None:
        super().__init__()
        self.path, self.warmup_steps = path, warmup_steps
        self.pace: Pace | None = None
        """Of the training that goes on."""
        self.report: dict[str, Any] | None = None
        """Of the training that ended, on all ranks."""
        self._until = ExitStack()
        self._learning_rate, self._gradient_norm = 0.0, torch.zeros(())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        clock = StepClock(CudaStamps() if trainer.strategy.root_device.type == "cuda" else None)
        self._until.enter_context(running(clock))
        connected: Any = trainer  # Lightning sets what follows without declaring it
        theirs, connected.profiler = connected.profiler, ClockProfiler(clock, connected.profiler)
        self._until.callback(setattr, trainer, "profiler", theirs)
        self.pace = Pace(clock)
        self._first_step, self._samples = trainer.global_step, 0
        self._warm_up: Totals | None = None if self.warmup_steps else (dict.fromkeys(PARTS, 0.0), 0, 0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.pace is not None:
            self.pace.clock.switch(REST)
        if is_log_step(trainer, trainer.global_step + 1):  # before the schedule moves on
            self._learning_rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if is_log_step(trainer, trainer.global_step + 1):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            self._gradient_norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pace = self.pace
        if pace is None:
            return
        self._samples += len(batch)
        pace.batch(_everyones(trainer, len(batch)), trainer.global_step - self._first_step)
        self._log(trainer, pl_module, pace)
        if self._warm_up is None and trainer.global_step - self._first_step >= self.warmup_steps:
            self._warm_up = self._totals(trainer, pace)
            self._first_step, self._samples = trainer.global_step, 0
            pace.begin()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.pace is not None:
            self.pace.clock.enter(VALIDATION)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.pace is not None:
            self.pace.clock.leave()
            self.pace.validated()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A collective: every rank tells what it took."""
        if self.pace is None:  # there was nothing left to train
            return
        (seconds, samples, steps), warmup_steps = self._totals(trainer, self.pace), self.warmup_steps
        if not steps or self._warm_up is None:  # it ended within its first steps
            (seconds, samples, steps), warmup_steps = self._warm_up or (seconds, samples, steps), 0
        memory = peak_memory()
        own = torch.tensor([*seconds.values(), samples, *memory.values()], dtype=torch.float64)
        everyone = gather_stacked(own.to(pl_module.device) if world_size() > 1 else own)
        columns = dict(zip([*PARTS, "samples", *memory], everyone.T.tolist(), strict=True))
        self.report = throughput(
            {part: columns[part] for part in PARTS},
            [round(count) for count in columns["samples"]],
            steps=steps,
            warmup_steps=warmup_steps,
        )
        self.report["peak_memory_bytes"] = {name: [round(value) for value in columns[name]] for name in memory}
        if self.path is not None and trainer.is_global_zero:
            self._write(self.path)

    def _write(self, path: Path) -> None:
        try:
            with replacing(path) as part:
                part.write_text(json.dumps(self.report, indent=1) + "\n")
        except OSError as error:  # a full disk at the end takes no model with it
            print(
                f"mmrep: warning: the throughput report cannot be written ({error.strerror}) [{path}]", file=sys.stderr
            )

    def _totals(self, trainer: pl.Trainer, pace: Pace) -> Totals:
        """Of this rank, since the run or the time after its first steps began; waits for the GPU."""
        return pace.clock.seconds(wait=True), self._samples, trainer.global_step - self._first_step

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        self._until.close()
        self.pace = None

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, pace: Pace) -> None:
        if not is_log_step(trainer, trainer.global_step):
            return
        figures = {
            "samples_per_second": pace.samples_per_second,
            "data_wait_share": pace.data_wait_share,
            "learning_rate": self._learning_rate,
            "gradient_norm": self._gradient_norm,
        }
        log_figures(pl_module, {f"train/{name}": value for name, value in figures.items() if value is not None})


def _everyones(trainer: pl.Trainer, own: int) -> int:
    """Samples of all ranks' batches: what the data module was asked for, or as many on each rank as on this one."""
    asked = getattr(trainer.datamodule, "global_batch_size", None)  # type: ignore[attr-defined]  # set by a connector
    return own * trainer.world_size if asked is None else int(asked)
