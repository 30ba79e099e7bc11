"""Figures that a checkpoint or an early stop goes by: that they exist, and that they are of this epoch."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn

from mmrep.callbacks.evaluation import PREFIX, evaluation_callbacks
from mmrep.errors import ConfigError, did_you_mean


def check_monitor(trainer: pl.Trainer, monitor: str, where: str) -> None:
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


def is_due(trainer: pl.Trainer, monitor: str) -> bool:
    """Whether the figure is of this epoch.

    Lightning keeps the figures of earlier epochs, and a callback that evaluates every n epochs leaves an old one there, which
    would count as an epoch without progress, or pass for a figure of weights that it is not of.
    """
    owners = [callback for callback in evaluation_callbacks(trainer) if monitor in callback.logged_names()]
    return all(owner.due(trainer) for owner in owners)


def require_figure(trainer: pl.Trainer, monitor: str, where: str) -> None:
    """Refuse to go on without the figure that decides.

    Raises:
        ConfigError: With the nearest figure that was logged.
    """
    logged = sorted(trainer.callback_metrics)
    if monitor not in logged:
        raise ConfigError(f"no figure '{monitor}' was logged", where=where, fix=_advice(monitor, logged))


def warn_of_missing(trainer: pl.Trainer, monitor: str, where: str) -> None:
    """Say after the sanity check that the first validation may not have the figure: a few batches may lack some."""
    logged = sorted(trainer.callback_metrics)
    if trainer.sanity_checking and monitor.startswith("val/") and monitor not in logged:
        rank_zero_warn(f"the sanity check logged no '{monitor}' [{where}]; {_advice(monitor, logged)}")


def _advice(monitor: str, logged: list[str]) -> str:
    """The nearest figure, and all there are."""
    near, everything = did_you_mean(monitor, logged), ", ".join(logged)
    return near if near.startswith("choose") else f"{near} there are: {everything}"
