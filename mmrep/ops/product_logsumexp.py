"""Log-sum-exp of all inner products in both directions, from one pass over tiles: what InfoNCE and Symile are made of.

Logits ``L[(i, r), c] = s sum_d x[i, d] rest[r, d] y[c, d]`` (of two modalities: without ``rest``) are never in memory together.
Each is exponentiated once, and serves its row's sum and its column's. The backward pass makes the gradients of a tile's
logits from the sums, ``exp(L - shift) (u_row + v_column)``, and multiplies them with both sides: four matrix products in all,
or three where the tiles are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrep.ops.forward_gradient import differentiable_gradients
from mmrep.ops.paths import choose_path
from mmrep.ops.tile_pass import TilePass
from mmrep.ops.tiles import Positives


def product_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    rest: Tensor | None = None,
    offset: int = 0,
    rest_stride: int = 1,
    stride: int = 1,
    row_weights: Tensor | None = None,
    column_weights: Tensor | None = None,
    without_positives: bool = False,
    terms: int = 1,
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the rows and of the columns of ``L``, and its positives.

    ``rows[p] = log sum_c w_c exp L[p, c]`` and ``columns[c] = log sum_p a_p exp L[p, c]``, with weights w and a; a sum over
    nothing is -inf. Differentiable in x, rest, y and scale, twice if need be (then with all logits in memory).

    Args:
        x: ``[n, D]``; half precision is multiplied as it is, everything else is done in fp32.
        y: ``[C, D]``.
        scale: s, a scalar.
        rest: ``[R, D]``: rows are the n x R combinations, rest running fastest.
        offset, rest_stride, stride: Where the positives stand: see `Positives`.
        row_weights, column_weights: ``[n R]`` and ``[C]``, without gradient; 0 for what is absent.
        without_positives: Whether the positives are left out of the sums.
        terms: See `choose_path`.
        path: One of `mmrep.ops.paths.PATHS`; by default the shapes decide.

    Returns:
        ``[n R]``, ``[C]``, and the positives' logits ``[n]``, at least fp32.
    """
    chosen = choose_path(
        len(x) * (1 if rest is None else len(rest)), len(y), x.dtype, device=x.device, terms=terms, path=path
    )
    where = [offset, 0 if rest is None else rest_stride, stride]
    weights = row_weights, column_weights
    with torch.autocast(x.device.type, enabled=False):
        if chosen.name == "dense":
            return _dense(x, rest, y, scale, *weights, where, without_positives)
        how = (where, without_positives, chosen.name == "cached", chosen.name == "triton")
        rows, columns, positives, _, _ = _forward(x, rest, y, scale, *weights, *how)
    return rows, columns, positives


def _dense(
    x: Tensor,
    rest: Tensor | None,
    y: Tensor,
    scale: Tensor,
    row_weights: Tensor | None,
    column_weights: Tensor | None,
    where: list[int],
    without_positives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain formulas, all logits at once."""
    x, y, scale = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (x, y, scale))
    products = x if rest is None else (x[:, None] * rest.to(x.dtype)).flatten(0, 1)
    logits = scale * (products @ y.T)
    own, (offset, rest_stride, stride) = torch.arange(len(x), device=x.device), where
    rows = own * (1 if rest is None else len(rest)) + (own + offset) * rest_stride
    places = rows * len(y) + (own + offset) * stride
    positives = logits.flatten()[places]
    if without_positives:
        logits = logits.flatten().index_fill(0, places, -torch.inf).view_as(logits)
    by_row = logits if column_weights is None else logits + column_weights.to(logits.dtype).log()
    by_column = logits if row_weights is None else logits + row_weights.to(logits.dtype).log()[:, None]
    return safe_logsumexp(by_row, 1), safe_logsumexp(by_column, 0), positives


def safe_logsumexp(logits: Tensor, dim: int) -> Tensor:
    """-inf without a gradient where all are -inf; there, torch's own has a gradient of NaN."""
    nothing = (logits == -torch.inf).all(dim=dim, keepdim=True)
    found = logits.masked_fill(nothing, 0.0).logsumexp(dim=dim)
    return found.masked_fill(nothing.squeeze(dim), -torch.inf)


def _tile_pass(
    x: Tensor,
    rest: Tensor | None,
    y: Tensor,
    scale: Tensor,
    row_weights: Tensor | None,
    column_weights: Tensor | None,
    where: list[int],
    without_positives: bool,
    triton: bool,
) -> TilePass:
    kind = TilePass
    if triton:
        from mmrep.ops.triton_tiles import TritonPass

        kind = TritonPass
    return kind(x, rest, y, scale, row_weights, column_weights, Positives(*where), without_positives)


@torch.library.custom_op("mmrep::product_logsumexp", mutates_args=())
def _forward(
    x: Tensor,
    rest: Tensor | None,
    y: Tensor,
    scale: Tensor,
    row_weights: Tensor | None,
    column_weights: Tensor | None,
    where: list[int],
    without_positives: bool,
    keep: bool,
    triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, columns, positives, the tiles that are kept, and the shift of the exponents."""
    run = _tile_pass(x, rest, y, scale, row_weights, column_weights, where, without_positives, triton)
    kept = x.new_empty(run.count * len(y) if keep else 0, dtype=run.wide)
    rows, columns, positives, shift = run.forward(kept)
    return rows, columns, positives, kept, shift


@torch.library.custom_op("mmrep::product_logsumexp_backward", mutates_args=())
def _backward(
    x: Tensor,
    rest: Tensor | None,
    y: Tensor,
    scale: Tensor,
    row_weights: Tensor | None,
    column_weights: Tensor | None,
    where: list[int],
    without_positives: bool,
    triton: bool,
    kept: Tensor,
    shift: Tensor,
    sums: list[Tensor],
    grads: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, rest (empty where there is none), y and scale, in their types."""
    run = _tile_pass(x, rest, y, scale, row_weights, column_weights, where, without_positives, triton)
    dx, drest, dy, dscale = run.backward(kept, shift, (sums[0], sums[1]), (grads[0], grads[1], grads[2]))
    drest = x.new_empty(0) if drest is None or rest is None else drest.to(rest.dtype)
    return dx.to(x.dtype), drest, dy.to(y.dtype), dscale.to(scale.dtype)


@_forward.register_fake
def _fake_forward(
    x: Tensor,
    rest: Tensor | None,
    y: Tensor,
    scale: Tensor,
    a: Any,
    w: Any,
    where: Any,
    without: Any,
    keep: bool,
    triton: bool,
) -> tuple[Tensor, ...]:
    rows = len(x) * (1 if rest is None else len(rest))
    sizes = (rows,), (len(y),), (len(x),), (rows * len(y) if keep else 0,), ()
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(size, dtype=wide) for size in sizes)


@_backward.register_fake
def _fake_backward(
    x: Tensor, rest: Tensor | None, y: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = x.new_empty(0) if rest is None else torch.empty_like(rest)
    return torch.empty_like(x), empty, torch.empty_like(y), torch.empty_like(scale)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, rest, y, scale, row_weights, column_weights, ctx.where, ctx.without_positives, _, ctx.triton = inputs
    rows, columns, _, kept, shift = output
    ctx.mark_non_differentiable(kept, shift)
    ctx.save_for_backward(x, rest, y, scale, row_weights, column_weights, rows, columns, kept, shift)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, rest, y, scale, row_weights, column_weights, rows, columns, kept, shift = ctx.saved_tensors
    inputs = x, rest, y, scale, row_weights, column_weights, ctx.where, ctx.without_positives
    if torch.is_grad_enabled():  # the gradient is to be differentiated again: plain formulas
        dx, drest, dy, dscale = differentiable_gradients(
            lambda a, b, c, d: _dense(a, b, c, d, row_weights, column_weights, ctx.where, ctx.without_positives),
            (x, rest, y, scale),
            grads[:3],
        )
    else:
        dx, drest, dy, dscale = _backward(*inputs, ctx.triton, kept, shift, [rows, columns], list(grads[:3]))
        drest = None if rest is None else drest
    return dx, drest, dy, dscale, None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
