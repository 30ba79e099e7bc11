"""Which steps are log steps."""

from __future__ import annotations

import pytorch_lightning as pl


def is_log_step(trainer: pl.Trainer, step: int) -> bool:
    """Whether Lightning writes the figures of the step with this number, from 1.

    To log a figure takes Lightning some 0.2 ms, whether it is written or not: only what is written is worth it.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of Lightning's connectors
    return every > 0 and step % every == 0
