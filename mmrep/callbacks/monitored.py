"""Lightning's best-k checkpoints and early stop, by any figure that a run logs, also one that comes every few epochs."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from mmrep.callbacks.monitor import check_monitor, is_due, require_figure, warn_of_missing


class MonitoredCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint`, which takes the same arguments, with four differences.

    - A figure of an `EvaluationCallback` that is not due in an epoch is waited for: Lightning would go by that of an
      earlier epoch, or fail where there is none yet.
    - A misspelt monitor is told before the first step, or at the first validation, with the nearest name that there is.
    - With ``save_last`` the last checkpoint is written whenever one is due, and not only where it is among the best:
      otherwise a run that no longer improves would go on from an old one.
    - A ``/`` in a figure's name makes no folder in ``filename``.

    ``mmrep fit`` makes one from ``--checkpoint.monitor`` and so on.

    Example:
        ::

            mmrep fit --config FILE --checkpoint.monitor eval/knn_image/acc1 --checkpoint.mode max --checkpoint.save_top_k 3
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None:
            check_monitor(trainer, self.monitor, "checkpoint.monitor")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None and trainer.state.fn == TrainerFn.FITTING:
            warn_of_missing(trainer, self.monitor, "checkpoint.monitor")
        super().on_validation_end(trainer, pl_module)

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor is None or is_due(trainer, self.monitor):
            if self.monitor is not None and self.monitor not in monitor_candidates:
                require_figure(trainer, self.monitor, "checkpoint.monitor")
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_last:
            self._last_global_step_saved = trainer.global_step  # by this Lightning decides on the last checkpoint

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
    epochs without progress. A misspelt monitor is told before the first step, or at the first validation.

    Example:
        In a config::

            trainer:
              callbacks:
                - class_path: mmrep.callbacks.MonitoredStopping
                  init_args: {monitor: eval/knn_image/acc1, mode: max, patience: 5}
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_monitor(trainer, self.monitor, "MonitoredStopping.monitor")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            warn_of_missing(trainer, self.monitor, "MonitoredStopping.monitor")
        super().on_validation_end(trainer, pl_module)

    def _run_early_stopping_check(self, trainer: pl.Trainer) -> None:
        if not is_due(trainer, self.monitor):
            return
        if self.strict and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by one of Lightning's connectors
            require_figure(trainer, self.monitor, "MonitoredStopping.monitor")
        super()._run_early_stopping_check(trainer)
