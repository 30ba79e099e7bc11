"""The terms that contrast two sets of rows: InfoNCE and its sigmoid form, and their temperature."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.errors import ConfigError


def info_nce(x: Tensor, y: Tensor, mine: slice, scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Symmetric InfoNCE, summed over this rank's rows (Oord et al. 2018, equation 4; Radford et al. 2021, figure 3).

    ``1/2 sum_i [ lse_j s x_i.y_j + lse_j s y_i.x_j - 2 s x_i.y_i ]``, i over ``mine``, j over all.

    Args:
        x, y: ``[K, D]`` of all ranks; row i of one belongs to row i of the other.
        mine: Which rows are this rank's.
        scale: What inner products are multiplied by.
        label_smoothing: Share of the target that goes to all columns alike.
    """
    return diagonal_cross_entropy(scale * (x[mine] @ y.T), scale * (y[mine] @ x.T), mine, label_smoothing)


def diagonal_cross_entropy(rows: Tensor, columns: Tensor, mine: slice, label_smoothing: float = 0.0) -> Tensor:
    """Mean of two directions' cross-entropies, summed over this rank's rows.

    Args:
        rows, columns: Logits ``[k, K]`` of this rank's rows against all columns, one tensor a direction.
        mine: Which of the K are this rank's: the right answers.
        label_smoothing: Share of the target that goes to all columns alike.
    """
    right = torch.arange(mine.start, mine.stop, device=rows.device)
    directions = [
        F.cross_entropy(logits, right, reduction="sum", label_smoothing=label_smoothing) for logits in (rows, columns)
    ]
    return torch.stack(directions).mean()


def sigmoid_loss(x: Tensor, y: Tensor, mine: slice, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP, summed over this rank's rows (Zhai et al. 2023, equation 1): each of the K^2 combinations is a yes or a no.

    ``- sum_i sum_j log sigmoid( z_ij (s x_i.y_j + b) )`` with z = 1 on the diagonal and -1 elsewhere; arguments as `info_nce`.
    """
    logits = scale * (x[mine] @ y.T) + bias
    signs = -torch.ones_like(logits)
    signs[:, mine].fill_diagonal_(1.0)
    return -F.logsigmoid(signs * logits).sum()


def make_logit_scale(
    temperature: float, maximum: float | None, *, learn: bool, shape: tuple[int, ...] = ()
) -> nn.Parameter:
    """A logit scale: the log of the inverse temperature, at most ``log(maximum)``.

    Raises:
        ConfigError: If the temperature or the maximum is not positive.
    """
    if not (temperature > 0 and (maximum is None or maximum > 0)):
        raise ConfigError(f"init_temperature={temperature} and max_logit_scale={maximum} must be positive")
    value = -math.log(temperature) if maximum is None else min(-math.log(temperature), math.log(maximum))
    return nn.Parameter(torch.full(shape, value), requires_grad=learn)


@torch.no_grad()
def clamp_logit_scale(logit_scale: Tensor, maximum: float | None) -> None:
    """Bring a learned logit scale back to its maximum, as CLIP does after each step (Radford et al. 2021, section 2.5).

    Not inside the graph: there the clamp would cut the gradient, and hold the scale at its maximum for good.
    """
    if maximum is not None:
        logit_scale.clamp_(max=math.log(maximum))
