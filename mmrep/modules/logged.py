"""Logging figures through Lightning: which steps are log steps, and several figures at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


def is_log_step(trainer: pl.Trainer, step: int) -> bool:
    """Whether Lightning writes the figures of the step with this number, from 1."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of Lightning's connectors
    return every > 0 and step % every == 0


def log_figures(
    module: pl.LightningModule, figures: Mapping[str, Tensor | float], batch_size: int = 1, *, begun: bool = False
) -> None:
    """`LightningModule.log` of several figures, from one hook.

    It checks and copies for some 0.2 ms a figure, each time. The first figure of a hook goes through it, as it also begins an
    epoch; others that the hook has logged before are only updated, which is the last thing that it does.

    Args:
        module: Its hook, or a callback's, that runs.
        figures: By name, the same kinds each time.
        batch_size: What a mean over an epoch weighs them with.
        begun: Whether the hook has logged something else just now.
    """
    results: Any = getattr(module._trainer, "_results", None)
    for name, value in figures.items():
        key = f"{module._current_fx_name}.{name}"
        if begun and results is not None and results.dataloader_idx is None and key in results:
            kept = value.detach() if isinstance(value, Tensor) else torch.tensor(value, device=module.device)
            results.update_metrics(key, kept.squeeze(), batch_size)
        else:
            module.log(name, value, batch_size=batch_size)
        begun = True
