"""Optimisers and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import check_choice

OPTIMIZERS = ("adamw", "lars", "larc")
LARS_MOMENTUM = 0.9


def make_optimizer(
    name: str,
    model: nn.Module,
    not_decayed: Iterable[Tensor],
    *,
    lr: float,
    weight_decay: float,
    scales: Mapping[int, float] | None = None,
) -> torch.optim.Optimizer:
    """An optimiser over everything that is trained.

    Args:
        name: ``adamw``; ``lars`` (You et al. 2017), or ``larc``, LARS that never raises a rate: both over SGD with momentum .9,
            from timm; parameters without decay take plain SGD steps there.
        model: What is trained.
        not_decayed: Weights that keep their size; biases, norms and scales do in any case.
        lr: Peak learning rate.
        weight_decay: Of the other weights.
        scales: ``id`` of a parameter -> what its learning rate is multiplied with; 1 where it is not named.

    Raises:
        ConfigError: On an unknown name.
    """
    groups = _groups(model, not_decayed, lr, weight_decay, scales or {})
    if name == "adamw":
        adamw = torch.optim.AdamW(groups, lr=lr, fused=True)  # one pass over the weights
        adamw._step_supports_amp_scaling = False  # where it unscales gradients itself, Lightning does not clip them
        return adamw
    check_choice("optimizer", name, OPTIMIZERS)
    from timm.optim.lars import Lars  # timm's import takes seconds, which only its users should pay

    lars: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=LARS_MOMENTUM, trust_clip=name == "larc")
    return lars


def _groups(
    model: nn.Module, not_decayed: Iterable[Tensor], lr: float, weight_decay: float, scales: Mapping[int, float]
) -> list[dict[str, Any]]:
    """Parameter groups: one for each factor of the learning rate, highest first, with weight decay and one without."""
    whole = {id(parameter) for parameter in not_decayed}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = []
    for scale in sorted({scales.get(id(parameter), 1.0) for parameter in trained}, reverse=True):
        equal = [parameter for parameter in trained if scales.get(id(parameter), 1.0) == scale]
        decayed = [parameter for parameter in equal if parameter.ndim > 1 and id(parameter) not in whole]
        kept = [parameter for parameter in equal if parameter.ndim <= 1 or id(parameter) in whole]
        groups.append({"params": decayed, "weight_decay": weight_decay, "lr": lr * scale})
        groups.append({"params": kept, "weight_decay": 0.0, "lr": lr * scale})
    return [group for group in groups if group["params"]]


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """`LambdaLR` that takes up parameter groups that a callback adds on the way, at their own rate: torch's raises then."""

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups at this step."""
        groups = self.optimizer.param_groups
        # Each by itself: a checkpoint has the rates, and no functions.
        self.lr_lambdas += [self.lr_lambdas[0]] * (len(groups) - len(self.lr_lambdas))
        self.base_lrs += [group.setdefault("initial_lr", group["lr"]) for group in groups[len(self.base_lrs) :]]
        return super().get_lr()


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step: linear from 0 to 1, then half a cosine to 0.

    A function and no object: `LambdaLR` would keep an object's attributes in checkpoints, and a run that is resumed for more
    epochs would go on with the old end of its cosine, at rate 0.

    Args:
        warmup: Steps of the rise.
        total: Steps of the run; 0 for a run without an end, whose rate stays at its peak.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup) if total else 0.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
