"""One pass over the tiles of a matrix of logits: sums of exponentials forward, products with their gradients backward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mmrep.ops.tiles import Positives, Tile, tiles

SAFE_EXPONENT = 60.0
"""Exponents are shifted to stay below it, so that their sums stay in fp32."""

LEAST_SUM = 1e-30
"""A sum below it, per entry, has lost digits to underflow."""


class TilePass:
    """Logits ``L[(i, r), c] = s sum_d x[i, d] rest[r, d] y[c, d]``, tile by tile, in buffers that all tiles share.

    Args:
        x, rest, y, scale: ``[n, D]``, ``[R, D]`` or None, ``[C, D]``, and s.
        row_weights, column_weights: ``[n R]`` and ``[C]``, or None for ones.
        positives: Where they stand.
        without_positives: Whether they are left out of the sums.
    """

    def __init__(
        self,
        x: Tensor,
        rest: Tensor | None,
        y: Tensor,
        scale: Tensor,
        row_weights: Tensor | None,
        column_weights: Tensor | None,
        positives: Positives,
        without_positives: bool,
    ) -> None:
        self.wide = torch.promote_types(x.dtype, torch.float32)
        # CPUs multiply half precision slower than fp32; GPUs accumulate its products in fp32.
        narrow = x.dtype if x.is_cuda else self.wide
        self.x, self.y, self.scale = x.to(narrow), y.to(narrow), scale.to(self.wide)
        self.rest = None if rest is None else rest.to(narrow)
        self.row_weights = None if row_weights is None else row_weights.to(self.wide)
        self.column_weights = None if column_weights is None else column_weights.to(self.wide)
        self.positives, self.without_positives = positives, without_positives
        self.rests = 1 if rest is None else len(rest)
        self.count = len(x) * self.rests
        self.tiles = list(tiles(len(x), self.rests, len(y), x.device))
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-sum-exp of rows and columns, the positives, and the shift of the exponents.

        First with one shift for all, which costs one exponential an entry. Where a sum then leaves the range of the type, each
        tile has its own maximum, rows and columns apart, and the shift is NaN.

        Args:
            kept: Empty, or room for all entries: of exponentials, and of logits where the shift is NaN.
        """
        shift = self._shift()
        found = self._sums(kept, shift)
        if found is None:
            return (*self._safe_sums(kept), torch.full_like(shift, torch.nan))
        return (*found, shift)

    def _shift(self) -> Tensor:
        """No inner product exceeds the product of lengths (Cauchy and Schwarz); rows that are products are far shorter than
        their factors."""
        if not (self.count and len(self.y)):
            return self.scale.new_zeros(())
        x, y = self.x.to(self.wide).square(), self.y.norm(dim=1, dtype=self.wide).max()
        squares = x.sum(dim=1) if self.rest is None else x @ self.rest.to(self.wide).square().T
        largest: Tensor = self.scale.abs() * squares.max().sqrt() * y
        return (largest - SAFE_EXPONENT).clamp(min=0.0)

    def _sums(self, kept: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        rows, columns, positives = (kept.new_zeros(n) for n in (self.count, len(self.y), len(self.x)))
        shifted = bool(shift > 0)
        for tile, room in self._rooms(kept):
            self._add_sums(tile, room, shift if shifted else None, (rows, columns), positives)
        sums = torch.cat([rows, columns])
        fine = sums.isfinite() & (sums >= LEAST_SUM * max(1, self.count, len(self.y)))
        if not shifted:
            fine |= sums == 0  # nothing underflows here: all weights are zero
        if not bool(fine.all()):
            return None
        return rows.log() + shift, columns.log() + shift, positives

    def _add_sums(
        self, tile: Tile, room: Tensor | None, shift: Tensor | None, sums: tuple[Tensor, Tensor], positives: Tensor
    ) -> None:
        """Add a tile to the sums of rows and columns, leave its exponentials in its room, take its positives down."""
        logits = self._logits(tile, room, positives)
        exponentials = (logits if shift is None else logits.sub_(shift)).exp_()
        if self.without_positives:
            self.positives.of(exponentials, tile).zero_()
        row_weights, column_weights = self._weights(tile)
        sums[0][self._flat(tile)] += exponentials @ column_weights
        sums[1][tile.columns] += exponentials.T @ row_weights

    def _safe_sums(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = (kept.new_full((n,), -torch.inf) for n in (self.count, len(self.y)))
        positives = kept.new_zeros(len(self.x))
        for tile, room in self._rooms(kept):
            logits = self._logits(tile, room, positives)
            if self.without_positives:
                self.positives.of(logits, tile).fill_(-torch.inf)
            row_weights, column_weights = self._weights(tile)
            flat, part = self._flat(tile), tile.columns
            rows[flat] = torch.logaddexp(rows[flat], (logits + column_weights.log()).logsumexp(dim=1))
            columns[part] = torch.logaddexp(columns[part], (logits + row_weights.log()[:, None]).logsumexp(dim=0))
        return rows, columns, positives

    @torch.no_grad()
    def backward(
        self,
        kept: Tensor,
        shift: Tensor,
        sums: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of x, rest, y and scale, from what `forward` gave, and the gradients of rows, columns and positives."""
        dx = torch.zeros_like(self.x, dtype=self.wide)
        dy = torch.zeros_like(self.y, dtype=self.wide)
        drest = None if self.rest is None else torch.zeros_like(self.rest, dtype=self.wide)
        for tile, rows, gradient in self._gradients(kept, shift, sums, grads):
            self._add_left(tile, gradient, dx, drest)
            _add_product(dy[tile.columns], gradient.T, rows)
        dscale = (self.x * dx).sum()  # every logit is linear in x
        for total in (dx, dy, drest):
            if total is not None:
                total *= self.scale
        return dx, drest, dy, dscale

    def _gradients(
        self, kept: Tensor, shift: Tensor, sums: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor, Tensor]
    ) -> Iterator[tuple[Tile, Tensor, Tensor]]:
        """The tiles with their rows and the gradients of their logits."""
        safe = bool(shift.isnan())
        # Where a sum is over nothing, nothing flows.
        u, v = (torch.where(total.isfinite(), grad, 0.0) for total, grad in zip(sums, grads[:2], strict=True))
        if not safe:
            u, v = (g * torch.where(s.isfinite(), shift - s, 0.0).exp() for g, s in zip((u, v), sums, strict=True))
        for tile, room in self._rooms(kept):
            rows = self._rows(tile)
            if safe:
                logits = self._tile_logits(rows, tile) if room is None else room
                gradient = self._safe_gradient(tile, logits, sums, (u, v), grads[2])
            elif room is not None:
                gradient = self._finish(tile, self._mix(tile, u, v).mul_(room), grads[2])
            else:
                gradient = self._gradient(tile, rows, shift, (u, v), grads[2])
            yield tile, rows, gradient

    def _gradient(
        self, tile: Tile, rows: Tensor, shift: Tensor, sides: tuple[Tensor, Tensor], positives: Tensor
    ) -> Tensor:
        """Of a tile's logits, which are made again: ``exp(L - shift) (u w + a v)``, and the positives' own."""
        logits = self._tile_logits(rows, tile)
        return self._finish(tile, self._mix(tile, *sides).mul_(logits.sub_(shift).exp_()), positives)

    def _finish(self, tile: Tile, gradient: Tensor, positives: Tensor) -> Tensor:
        own = self.positives.of(gradient, tile)
        if self.without_positives:
            own.zero_()
        own += positives[self.positives.inside(tile)]
        return gradient

    def _mix(self, tile: Tile, u: Tensor, v: Tensor) -> Tensor:
        """``u_p w_c + a_p v_c``."""
        out = self._buffer("gradient", tile.shape)
        left, right = u[self._flat(tile)][:, None], v[tile.columns][None]
        if self.row_weights is None and self.column_weights is None:
            return torch.add(left, right, out=out)
        row_weights, column_weights = self._weights(tile)
        return torch.mul(left, column_weights[None], out=out).addcmul_(row_weights[:, None], right)

    def _safe_gradient(
        self, tile: Tile, logits: Tensor, sums: tuple[Tensor, Tensor], sides: tuple[Tensor, Tensor], positives: Tensor
    ) -> Tensor:
        row_weights, column_weights = self._weights(tile)
        flat, part = self._flat(tile), tile.columns
        u, v = sides[0][flat], sides[1][part]
        out = self._buffer("gradient", tile.shape)
        rows, columns = (torch.where(total.isfinite(), total, 0.0) for total in (sums[0][flat], sums[1][part]))
        torch.sub(logits, rows[:, None], out=out).add_(column_weights.log()).exp_().mul_(u[:, None])
        other = torch.sub(logits, columns, out=self._buffer("other", tile.shape))
        out.addcmul_(other.add_(row_weights.log()[:, None]).exp_(), v)
        return self._finish(tile, out, positives)

    def _add_left(self, tile: Tile, gradient: Tensor, dx: Tensor, drest: Tensor | None) -> None:
        """Add the gradient of a tile's rows to those of their factors, still without the scale."""
        y = self.y[tile.columns]
        if self.rest is None or drest is None:
            _add_product(dx[tile.left], gradient, y)
            return
        x, rest = self.x[tile.left], self.rest[tile.rest]
        drows = self._buffer("drows", (tile.shape[0], y.shape[1])).zero_()
        _add_product(drows, gradient, y)
        drows = drows.view(len(x), len(rest), -1)
        for one, row in zip(drows, x, strict=True):
            drest[tile.rest].addcmul_(one, row)
        dx[tile.left] += drows.mul_(rest).sum(dim=1)

    def _rooms(self, kept: Tensor) -> Iterator[tuple[Tile, Tensor | None]]:
        """The tiles with the room of their entries, where they are kept."""
        done = 0
        for tile in self.tiles:
            yield tile, kept[done : done + math.prod(tile.shape)].view(tile.shape) if len(kept) else None
            done += math.prod(tile.shape)

    def _logits(self, tile: Tile, room: Tensor | None, positives: Tensor) -> Tensor:
        """A tile's logits, in its room or the buffer of all; takes the positives down."""
        logits = self._tile_logits(self._rows(tile), tile, room)
        positives[self.positives.inside(tile)] = self.positives.of(logits, tile)
        return logits

    def _tile_logits(self, rows: Tensor, tile: Tile, room: Tensor | None = None) -> Tensor:
        """``[p, c]``, scaled in fp32 after the product."""
        out = self._buffer("logits", tile.shape) if room is None else room
        columns = self.y[tile.columns].T
        if rows.dtype == out.dtype:
            torch.mm(rows, columns, out=out)
        else:
            torch.mm(rows, columns, out_dtype=out.dtype, out=out)
        return out.mul_(self.scale)

    def _rows(self, tile: Tile) -> Tensor:
        """``[p, D]``."""
        x = self.x[tile.left]
        if self.rest is None:
            return x
        rest = self.rest[tile.rest]
        out = self._buffer("rows", (len(x), len(rest), x.shape[1]), x.dtype)
        return torch.mul(x[:, None], rest, out=out).flatten(0, 1)

    def _flat(self, tile: Tile) -> slice:
        """Which of all rows are a tile's."""
        start = tile.left.start * self.rests + tile.rest.start
        return slice(start, start + tile.shape[0])

    def _weights(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Of a tile's rows and columns."""
        rows, columns = tile.shape
        return (
            self.scale.new_ones(rows) if self.row_weights is None else self.row_weights[self._flat(tile)],
            self.scale.new_ones(columns) if self.column_weights is None else self.column_weights[tile.columns],
        )

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Memory that the next tile uses again."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self.x.new_empty(size, dtype=dtype or self.wide)
        return self._buffers[name][:size].view(shape)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, total and a in fp32 or wider, b perhaps narrower: a is then rounded to it, its sums are not."""
    if b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a.to(b.dtype), b, out_dtype=total.dtype)
