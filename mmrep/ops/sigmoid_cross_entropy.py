"""SigLIP's loss over tiles: every logit stands for itself, so that its gradient can be made at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.ops.forward_gradient import gradients_wanted, register_forward_gradient
from mmrep.ops.paths import choose_path
from mmrep.ops.tiles import Positives, tiles


def sigmoid_cross_entropy(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, offset: int = 0, path: str | None = None
) -> Tensor:
    """``- sum_ij log sigmoid( z_ij (s x_i.y_j + b) )``, z = 1 where j = offset + i and -1 elsewhere (Zhai et al. 2023, eq. 1).

    Args:
        x: ``[n, D]``.
        y: ``[N, D]``.
        scale, bias: s and b, scalars.
        offset: Of the positives' columns.
        path: See `choose_path`; ``cached`` is as ``tiled``, there is nothing to keep.
    """
    with torch.autocast(x.device.type, enabled=False):
        if choose_path(len(x), len(y), x.dtype, path=path).name == "dense":
            return _dense(x, y, scale, bias, offset)
        loss: Tensor = _tiles(x, y, scale, bias, offset, gradients_wanted(x, y, scale, bias))[0]
    return loss


def _dense(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    x, y, scale, bias = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, y, scale, bias))
    logits = scale * (x @ y.T) + bias
    signs = -torch.ones_like(logits)
    signs[:, offset : offset + len(x)].fill_diagonal_(1.0)
    return -F.logsigmoid(signs * logits).sum()


@torch.library.custom_op("mmrep::sigmoid_cross_entropy", mutates_args=())
def _tiles(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, offset: int, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, y, scale, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y, scale, bias = (tensor.to(wide) for tensor in inputs)
    loss, dbias = scale.new_zeros(()), scale.new_zeros(())
    dx, dy = (torch.zeros_like(side) if gradients else side.new_empty(0) for side in (x, y))
    positives = Positives(offset, 0, 1)
    for tile in tiles(len(x), 1, len(y), x.device):
        logits = torch.mm(x[tile.left], y[tile.columns].T).mul_(scale).add_(bias)
        positives.of(logits, tile).neg_()  # now the probability of each mistake is the sigmoid of its entry
        loss -= F.logsigmoid(-logits).sum()
        if gradients:
            gradient = logits.sigmoid_()
            positives.of(gradient, tile).neg_()
            dbias += gradient.sum()
            dx[tile.left].addmm_(gradient, y[tile.columns])
            dy[tile.columns].addmm_(gradient.T, x[tile.left])
    if not gradients:
        a, b, c, d = (tensor.new_empty(0) for tensor in inputs)
        return loss, a, b, c, d
    dscale = (x * dx).sum()  # every logit but for the bias is linear in x
    found = dx.mul_(scale), dy.mul_(scale), dscale, dbias
    a, b, c, d = (gradient.to(tensor.dtype) for gradient, tensor in zip(found, inputs, strict=True))
    return loss, a, b, c, d


register_forward_gradient(_tiles, _dense, tensors=4, options=1)
