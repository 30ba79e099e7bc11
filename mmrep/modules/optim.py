"""Optimisers and their schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import ConfigError, did_you_mean

OPTIMIZERS = ("adamw", "lars", "larc")
LARS_MOMENTUM = 0.9


def make_optimizer(
    name: str, model: nn.Module, not_decayed: Iterable[Tensor], *, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser over everything that is trained.

    Args:
        name: ``adamw``; ``lars`` (You et al. 2017), or ``larc``, LARS that never raises a rate: both over SGD with momentum .9,
            from timm; parameters without decay take plain SGD steps there.
        model: What is trained.
        not_decayed: Weights that keep their size; biases, norms and scales do in any case.
        lr: Peak learning rate.
        weight_decay: Of the other weights.

    Raises:
        ConfigError: On an unknown name.
    """
    whole = {id(parameter) for parameter in not_decayed}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1 and id(parameter) not in whole]
    kept = [parameter for parameter in trained if parameter.ndim <= 1 or id(parameter) in whole]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    check_optimizer(name)
    from timm.optim.lars import Lars  # timm's import takes seconds, which only its users should pay

    lars: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=LARS_MOMENTUM, trust_clip=name == "larc")
    return lars


def check_optimizer(name: str) -> None:
    """Refuse an unknown optimiser.

    Raises:
        ConfigError: With the nearest known one.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer={name!r}", fix=did_you_mean(name, OPTIMIZERS))


class WarmupCosine:
    """Factor of the learning rate at a step: linear from 0 to 1, then half a cosine to 0.

    Args:
        warmup: Steps of the rise.
        total: Steps of the run; 0 for a run without an end, whose rate stays at its peak.
    """

    def __init__(self, warmup: int, total: int) -> None:
        self.warmup, self.total = warmup, total

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup) if self.total else 0.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
