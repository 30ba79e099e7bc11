"""The terms that contrast two sets of rows: InfoNCE and its sigmoid form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
