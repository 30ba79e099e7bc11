"""`EvaluationCallback`: what callbacks that log figures after a validation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.trainer.states import TrainerFn

from mmrep.data.datamodule import ShardDataModule
from mmrep.data.faults import MAX_BAD_FRACTION, FaultLog
from mmrep.data.shard_cache import ShardCache
from mmrep.errors import ConfigError
from mmrep.modules.fault_tolerance.preemption import Preemption
from mmrep.modules.logged import log_figures

PREFIX = "eval/"
"""Of all that these callbacks log."""
VALIDATING = ("fit", "validate")
"""The stages in which there is something to log."""


class EvaluationCallback(pl.Callback):
    """Logs figures as ``eval/NAME/FIGURE`` in some validations, equal on all ranks.

    A subclass says in `figures` what it may log, so that a monitor that nobody logs is found before the first step.

    Args:
        name: In the log.
        every_n_epochs: How often. Outside training every validation counts.

    Raises:
        ConfigError: If ``every_n_epochs`` is not positive.
    """

    def __init__(self, name: str, every_n_epochs: int = 1) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise ConfigError(f"every_n_epochs={every_n_epochs} must be at least 1", where=type(self).__name__)
        self.name, self.every_n_epochs = name, every_n_epochs

    def figures(self) -> list[str]:
        """The names of the figures, known after `setup`."""
        raise NotImplementedError

    def logged_names(self) -> list[str]:
        """The figures as a checkpoint's monitor names them."""
        return [f"{PREFIX}{self.name}/{figure}" for figure in self.figures()]

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether the validations of this epoch are to be logged."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        return not trainer.sanity_checking and not (fitting and (trainer.current_epoch + 1) % self.every_n_epochs)

    def log_figures(self, pl_module: pl.LightningModule, figures: Mapping[str, float]) -> None:
        """Log what is equal on all ranks already."""
        log_figures(pl_module, {f"{PREFIX}{self.name}/{name}": value for name, value in figures.items()})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse two callbacks that log under the same name.

        Raises:
            ConfigError: With the name.
        """
        mine = set(self.logged_names())
        for other in evaluation_callbacks(trainer):
            if other is not self and (both := mine.intersection(other.logged_names())):
                raise ConfigError(
                    f"two callbacks log '{min(both)}'", where="trainer.callbacks", fix="give one a 'name'"
                )


def evaluation_callbacks(trainer: pl.Trainer) -> list[EvaluationCallback]:
    """Those of a trainer, in order."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it undeclared
    return [callback for callback in callbacks if isinstance(callback, EvaluationCallback)]


def stop_point(trainer: pl.Trainer) -> Callable[[], None]:
    """What an evaluation calls between its batches, on all ranks equally often: it leaves the run that was told to stop."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # as above
    stops = [callback for callback in callbacks if isinstance(callback, Preemption)]

    def leave_if_asked() -> None:
        for stop in stops:
            stop.between_batches(trainer)

    return leave_if_asked


@contextmanager
def as_in_run(trainer: pl.Trainer) -> Iterator[FaultLog | None]:
    """An evaluation with the precision and the faults of the run's own validation. A collective: every rank enters it.

    Gives the log for corrupt samples: too many end a training after the evaluation, on all ranks together. None in an
    evaluation of its own, which refuses them.
    """
    data, faults = getattr(trainer, "datamodule", None), None
    if trainer.state.fn == TrainerFn.FITTING:
        faults = data.fault_log() if isinstance(data, ShardDataModule) else FaultLog(None, 0, MAX_BAD_FRACTION)
    with run_precision(trainer):
        yield faults
    if faults is not None:
        faults.check_over_ranks(trainer.strategy.root_device)


def run_precision(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """As the run computes in mixed precision, outside its own steps. Otherwise it is the weights' own."""
    precision = trainer.precision_plugin
    return precision.forward_context() if isinstance(precision, MixedPrecision) else nullcontext()


def run_cache(trainer: pl.Trainer) -> ShardCache | None:
    """Where a run keeps remote shards; None where it has no shards of its own."""
    data = getattr(trainer, "datamodule", None)
    return data.cache if isinstance(data, ShardDataModule) else None


def run_data(trainer: pl.Trainer, callback: str, *, train: bool = False) -> str:
    """What a run evaluates on, or trains on: folder or URL of the first dataset.

    Raises:
        ConfigError: If it has none that is indexed; ``callback`` is named.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]  # set by one of Lightning's connectors
    if not isinstance(data, ShardDataModule) or (data.stream is not None and (train or not data.eval_path)):
        raise ConfigError(
            f"{callback} wants indexed shards, and the run has none", fix="give it 'data': a folder or URL"
        )
    return data.sources[0].path if train or not data.eval_path else data.eval_path
