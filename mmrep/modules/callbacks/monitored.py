"""Lightning's best-k checkpoints and early stop, by any figure that a run logs, also one that comes every few epochs."""

from __future__ import annotations

from os.path import relpath
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from mmrep.errors import ConfigError, did_you_mean
from mmrep.modules.callbacks.evaluation import PREFIX, evaluation_callbacks
from mmrep.modules.fault_tolerance.checkpoint_io import DurableCheckpointIO

EVERY_STEP = "train/"
"""Before the names of figures that come without a validation."""
CHOICE = (
    *("best_k_models", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score", "current_score"),
    "_last_checkpoint_saved",
)
"""What `ModelCheckpoint` notes of a checkpoint before it is written."""


class MonitoredCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint`, which takes the same arguments, with these differences.

    - A figure of an `EvaluationCallback` that is not due in an epoch is waited for: Lightning would go by that of an
      earlier epoch, or fail where there is none yet.
    - A misspelt monitor is told before the first step, or at the first validation, with the nearest name that there is.
    - ``every_n_train_steps`` with a monitor writes only the last checkpoint at such a step; the best are chosen at every
      validation. Lightning would go by the figure of an earlier one, and write nothing before the first. A monitor
      ``train/...`` has a figure at every step.
    - With ``save_last`` the last checkpoint is written whenever one is due, and not only where it is among the best:
      otherwise a run that no longer improves would go on from an old one.
    - A ``/`` in a figure's name makes no folder in ``filename``.
    - A dry run (``trainer.fast_dev_run``) writes none at its end either.
    - ``save_on_exception`` holds for a process alone: one of several would wait for the others, which have no exception.
    - A checkpoint that could not be written (a full disk) is not among the best, and costs none of them.
    - Of a run folder that was moved the best are known by their new place, and those that are gone are forgotten.

    ``mmrep fit`` makes one from ``--checkpoint.monitor`` and so on.

    Example:
        ::

            mmrep fit --config FILE --checkpoint.monitor eval/knn_image/acc1 --checkpoint.mode max --checkpoint.save_top_k 3
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Add the choice at validations to the steps."""
        super().setup(trainer, pl_module, stage)
        try:
            self.format_checkpoint_name({})
        except (ValueError, LookupError) as error:
            raise ConfigError(f"{self.filename!r} names no file: {error}", where="checkpoint.filename") from error
        if not self._by_validation or stage != "fit":
            return
        if self._train_time_interval is not None:
            raise ConfigError(
                "a monitor has no new figure by the clock",
                where="checkpoint.train_time_interval",
                fix="give --checkpoint_minutes instead",
            )
        if self._every_n_train_steps and self.save_last == "link":
            raise ConfigError("steps without a new figure write no file to link to", where="checkpoint.save_last")
        if self._every_n_train_steps:
            self._every_n_epochs = 1

    @property
    def _by_validation(self) -> bool:
        """Whether the figure that decides comes with validations."""
        return self.monitor is not None and not self.monitor.startswith(EVERY_STEP)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None:
            _check_monitor(trainer, self.monitor, "checkpoint.monitor")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the new place of a moved folder into the state that is loaded next.

        Lightning would forget all of the best but one, and that one's figure. The first rank's folder decides.
        """
        state = checkpoint["callbacks"].get(self.state_key)
        if not state or self.dirpath is None or trainer.state.fn != TrainerFn.FITTING:
            return
        best, last = state["best_model_path"], state["last_model_path"]
        named = {name for name in (*state["best_k_models"], best, last, state["kth_best_model_path"]) if name}
        moved = {name: str(Path(self.dirpath, relpath(name, state["dirpath"]))) for name in sorted(named)}
        there = set(trainer.strategy.broadcast([name for name, path in moved.items() if Path(path).is_file()]))
        moved = {name: path for name, path in moved.items() if name in there}
        kept = {moved[name]: figure for name, figure in state["best_k_models"].items() if name in there}
        if kept and best not in there:
            path = (min if self.mode == "min" else max)(kept, key=lambda name: float(kept[name]))
            state["best_model_path"], state["best_model_score"] = path, kept[path]
        else:
            state["best_model_path"] = moved.get(best, best)
            state["best_model_score"] = state["best_model_score"] if best in there else None
        state["kth_best_model_path"] = moved.get(state["kth_best_model_path"], "")
        state |= {"dirpath": self.dirpath, "best_k_models": kept, "last_model_path": moved.get(last, "")}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._by_validation:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        every, stepped = self._every_n_train_steps, not trainer.fit_loop._should_accumulate()
        if self.save_last and every and trainer.global_step % every == 0 and stepped:
            before = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = before  # a validation after this step still has the best to choose

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None and trainer.state.fn == TrainerFn.FITTING:
            _warn_of_missing(trainer, self.monitor, "checkpoint.monitor")
        super().on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.world_size == 1:
            super().on_exception(trainer, pl_module, exception)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor is None or _is_due(trainer, self.monitor):
            if self.monitor is not None and self.monitor not in monitor_candidates:
                _require_figure(trainer, self.monitor, "checkpoint.monitor")
            before = {name: getattr(self, name) for name in CHOICE} | {"best_k_models": dict(self.best_k_models)}
            super()._save_topk_checkpoint(trainer, monitor_candidates)
            self._take_back_if_unwritten(trainer, before)
        if self.save_last:
            self._last_global_step_saved = trainer.global_step  # by this Lightning decides on the last checkpoint

    def _take_back_if_unwritten(self, trainer: pl.Trainer, before: dict[str, Any]) -> None:
        """Undo a choice whose checkpoint could not be written, which only the first rank knows."""
        checkpoints = trainer.strategy.checkpoint_io
        if not isinstance(checkpoints, DurableCheckpointIO):
            return
        if trainer.strategy.reduce_boolean_decision(checkpoints.failed is not None, all=False):
            for name, value in before.items():
                setattr(self, name, value)
            for path in (*self.best_k_models, self.best_model_path):
                checkpoints.keep(path)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by one of Lightning's connectors
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _format_checkpoint_name(
        self, filename: str | None, metrics: dict[str, Tensor], *args: Any, **options: Any
    ) -> str:
        name = super()._format_checkpoint_name(filename, metrics, *args, **options)
        for figure in sorted((figure for figure in metrics if "/" in figure), key=len, reverse=True):
            name = name.replace(f"{figure}=", f"{figure.replace('/', '_')}=")
        return name


class MonitoredStopping(EarlyStopping):
    """`EarlyStopping`, which takes the same arguments, and counts its ``patience`` in figures.

    A figure of an `EvaluationCallback` that comes every n epochs counts once, where Lightning counts the epochs between as
    epochs without progress. A misspelt monitor is told before the first step, or at the first validation. A run that it has
    stopped is complete: started again it trains no step more, unless its patience is longer now; another ``stopping_threshold``
    or ``divergence_threshold`` changes nothing. Another run that begins with a checkpoint of that one trains.

    Example:
        In a config::

            trainer:
              callbacks:
                - class_path: mmrep.modules.callbacks.MonitoredStopping
                  init_args: {monitor: eval/knn_image/acc1, mode: max, patience: 5}
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _check_monitor(trainer, self.monitor, "MonitoredStopping.monitor")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["callbacks"].get(self.state_key) or {}
        reason = state.get("stopping_reason", EarlyStoppingReason.NOT_STOPPED.value)
        longer = reason == EarlyStoppingReason.PATIENCE_EXHAUSTED.value and state["wait_count"] < self.patience
        if reason == EarlyStoppingReason.NOT_STOPPED.value or longer or not _of_this_run(trainer):
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            why = EarlyStoppingReason(reason).name.lower().replace("_", " ")
            print(
                f"the run had stopped early ({self.monitor}: {why}); it goes on with more patience, or without the callback"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            _warn_of_missing(trainer, self.monitor, "MonitoredStopping.monitor")
        super().on_validation_end(trainer, pl_module)

    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        if not _is_due(trainer, self.monitor):
            return
        if self.strict and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by one of Lightning's connectors
            _require_figure(trainer, self.monitor, "MonitoredStopping.monitor")
        super()._run_early_stopping_check(trainer)


def _of_this_run(trainer: pl.Trainer) -> bool:
    """Whether the checkpoint that is loaded lies where this run writes its own."""
    callbacks: list[Any] = list(trainer.checkpoint_callbacks)
    own = [Path(folder).resolve() for callback in callbacks if (folder := getattr(callback, "dirpath", None))]
    return trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve().parent in own


def _check_monitor(trainer: pl.Trainer, monitor: str, where: str) -> None:
    """Refuse before the first step to go by a figure that no callback will log.

    Args:
        trainer: Whose callbacks have been set up.
        monitor: Name of a figure. Only those of callbacks are known so early.
        where: The option, for the message.

    Raises:
        ConfigError: With the nearest figure that there is.
    """
    known = [name for callback in evaluation_callbacks(trainer) for name in callback.logged_names()]
    if monitor.startswith(PREFIX) and monitor not in known:
        raise ConfigError(f"no callback logs '{monitor}'", where=where, fix=_advice(monitor, known))


def _is_due(trainer: pl.Trainer, monitor: str) -> bool:
    """Whether the figure is of this epoch.

    Lightning keeps the figures of earlier epochs, and a callback that evaluates every n epochs leaves an old one there, which
    would count as an epoch without progress, or pass for a figure of weights that it is not of.
    """
    owners = [callback for callback in evaluation_callbacks(trainer) if monitor in callback.logged_names()]
    return all(owner.due(trainer) for owner in owners)


def _require_figure(trainer: pl.Trainer, monitor: str, where: str) -> None:
    """Refuse to go on without the figure that decides.

    Raises:
        ConfigError: With the nearest figure that was logged.
    """
    logged = sorted(trainer.callback_metrics)
    if monitor not in logged:
        raise ConfigError(f"no figure '{monitor}' was logged", where=where, fix=_advice(monitor, logged))


def _warn_of_missing(trainer: pl.Trainer, monitor: str, where: str) -> None:
    """Say after the sanity check that the first validation may not have the figure: a few batches may lack some."""
    logged = sorted(trainer.callback_metrics)
    if trainer.sanity_checking and monitor.startswith("val/") and monitor not in logged:
        rank_zero_warn(f"the sanity check logged no '{monitor}' [{where}]; {_advice(monitor, logged)}")


def _advice(monitor: str, logged: list[str]) -> str:
    """The nearest figure, and all there are."""
    near, everything = did_you_mean(monitor, logged), ", ".join(logged)
    return near if near.startswith("choose") else f"{near} there are: {everything}"
