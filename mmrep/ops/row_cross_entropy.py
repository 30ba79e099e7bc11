"""Cross-entropy of rows against columns, in one direction: Symile with shuffled negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrep.ops.forward_gradient import gradients_wanted, register_forward_gradient
from mmrep.ops.paths import choose_path

CPU_STRIP, GPU_STRIP, LEAST_HEIGHT = 2**21, 2**26, 256
"""Logits in memory at one time, but no fewer rows than are fast."""


def row_cross_entropy(
    x: Tensor, y: Tensor, positives: Tensor, scale: Tensor, places: Tensor, *, path: str | None = None
) -> Tensor:
    """``sum_i [ log( exp p_i + sum_{j != place_i} exp s x_i.y_j ) - p_i ]``, in memory linear in rows and columns.

    Args:
        x: ``[n, D]``.
        y: ``[N, D]``, what each row is compared with, but for one column.
        positives: ``[n]``: p, the logits that stand there instead.
        scale: s, a scalar.
        places: ``[n]``, which column that is.
        path: See `choose_path`; ``cached`` is as ``tiled``, there is nothing to keep.
    """
    with torch.autocast(x.device.type, enabled=False):
        if choose_path(len(x), len(y), x.dtype, path=path).name == "dense":
            return _dense(x, y, positives, scale, places)
        loss: Tensor = _strips(x, y, positives, scale, places, gradients_wanted(x, y, positives, scale))[0]
    return loss


def _dense(x: Tensor, y: Tensor, positives: Tensor, scale: Tensor, places: Tensor) -> Tensor:
    x, y, positives, scale = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y, positives, scale))
    logits = (scale * (x @ y.T)).scatter(1, places[:, None], positives[:, None])
    return (logits.logsumexp(dim=1) - positives).sum()


@torch.library.custom_op("mmrep::row_cross_entropy", mutates_args=())
def _strips(
    x: Tensor, y: Tensor, positives: Tensor, scale: Tensor, places: Tensor, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Strips of rows against all columns; their softmax is whole, so that its gradient can be made at once."""
    inputs = (x, y, positives, scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y, positives, scale = (tensor.to(wide) for tensor in inputs)
    loss, dpositives = scale.new_zeros(()), torch.zeros_like(positives)
    dx, dy = (torch.zeros_like(side) if gradients else side.new_empty(0) for side in (x, y))
    height = max(LEAST_HEIGHT, (GPU_STRIP if x.is_cuda else CPU_STRIP) // max(1, len(y)))
    buffer = x.new_empty(min(height, len(x)), len(y))
    for first in range(0, len(x), height):
        rows = slice(first, min(first + height, len(x)))
        logits = torch.mm(x[rows], y.T, out=buffer[: rows.stop - first]).mul_(scale)
        own = places[rows, None]
        logits.scatter_(1, own, positives[rows, None])
        highest = logits.amax(dim=1, keepdim=True)
        sums = logits.sub_(highest).exp_().sum(dim=1, keepdim=True)
        loss += (sums.log() + highest)[:, 0].sub(positives[rows]).sum()
        if gradients:
            logits.div_(sums)
            dpositives[rows] = logits.gather(1, own)[:, 0] - 1
            logits.scatter_(1, own, 0.0)
            torch.mm(logits, y, out=dx[rows])
            dy.addmm_(logits.T, x[rows])
    if not gradients:
        a, b, c, d = (tensor.new_empty(0) for tensor in inputs)
        return loss, a, b, c, d
    dscale = (x * dx).sum()  # every logit but the positives is linear in x
    found = dx.mul_(scale), dy.mul_(scale), dpositives, dscale
    a, b, c, d = (gradient.to(tensor.dtype) for gradient, tensor in zip(found, inputs, strict=True))
    return loss, a, b, c, d


register_forward_gradient(_strips, _dense, tensors=4, options=1)
