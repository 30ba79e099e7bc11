"""The tiles of `TilePass` in Triton: product, exponential and sums in one kernel, so that no logit leaves the chip.

The forward kernel writes partial sums a block each, which are added up in a fixed order: two runs are equal to the bit. The
backward kernel writes the gradients of a strip of logits in the rows' own type, for cuBLAS to multiply. Imported only where
it is asked for; triton comes with PyTorch for CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmrep.ops.tile_pass import TilePass
from mmrep.ops.tiles import Tile

BLOCK, DEPTH = 128, 64
"""Logits of a block's side, and how much of the width is multiplied at one time."""


@triton.jit  # type: ignore[untyped-decorator]  # triton has no types
def _tile(  # type: ignore[no-untyped-def]  # pointers and sizes
    rows, columns, scale, shift, row_weights, column_weights, positive_column, of_rows, of_columns, of_positives, out,
    row_sums, column_sums, positives, height, width, depth: tl.constexpr,
    precision: tl.constexpr, without: tl.constexpr, backward: tl.constexpr, block: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    """A block of logits ``s x.y``, then its part of both sums, or its gradients ``E (u w + a v) + positives'``."""
    down, across = tl.program_id(0), tl.program_id(1)
    i, j = down * block + tl.arange(0, block), across * block + tl.arange(0, block)
    inside_i, inside_j = i < height, j < width
    total = tl.zeros((block, block), dtype=tl.float32)
    for start in range(0, depth, step):
        k = start + tl.arange(0, step)
        inside_k = k < depth
        x = tl.load(rows + i[:, None] * depth + k[None, :], mask=inside_i[:, None] & inside_k[None, :], other=0.0)
        y = tl.load(columns + j[:, None] * depth + k[None, :], mask=inside_j[:, None] & inside_k[None, :], other=0.0)
        total += tl.dot(x, tl.trans(y), input_precision=precision)
    logits = total * tl.load(scale)
    place = tl.load(positive_column + i, mask=inside_i, other=-1)
    hit = (place[:, None] == j[None, :]) & inside_i[:, None] & inside_j[None, :]
    exponentials = tl.exp(logits - tl.load(shift))
    exponentials = tl.where(inside_i[:, None] & inside_j[None, :], exponentials, 0.0)
    if without:
        exponentials = tl.where(hit, 0.0, exponentials)
    a = tl.load(row_weights + i, mask=inside_i, other=0.0)
    w = tl.load(column_weights + j, mask=inside_j, other=0.0)
    if backward:
        u = tl.load(of_rows + i, mask=inside_i, other=0.0)
        v = tl.load(of_columns + j, mask=inside_j, other=0.0)
        own = tl.load(of_positives + i, mask=inside_i, other=0.0)
        gradient = exponentials * (u[:, None] * w[None, :] + a[:, None] * v[None, :])
        gradient += tl.where(hit, own[:, None], 0.0)
        where = out + i[:, None] * width + j[None, :]
        tl.store(where, gradient.to(out.dtype.element_ty), mask=inside_i[:, None] & inside_j[None, :])
    else:
        tl.store(row_sums + across * height + i, tl.sum(exponentials * w[None, :], axis=1), mask=inside_i)
        tl.store(column_sums + down * width + j, tl.sum(exponentials * a[:, None], axis=0), mask=inside_j)
        tl.store(positives + i[:, None] + tl.zeros((1, block), dtype=tl.int32), logits, mask=hit)


class TritonPass(TilePass):
    """See `TilePass`; keeps no tiles. What leaves the fast range falls back to its way."""

    def _launch(self, rows: Tensor, tile: Tile, shift: Tensor, outputs: dict[str, Tensor], **gradients: Tensor) -> None:
        height, width = tile.shape
        row_weights, column_weights = self._weights(tile)
        nothing = self.scale.new_zeros(1)
        names = ("of_rows", "of_columns", "of_positives"), ("out", "row_sums", "column_sums", "positives")
        grid = (triton.cdiv(height, BLOCK), triton.cdiv(width, BLOCK))
        arguments: list[Any] = [
            rows.contiguous(),  # a view of many is not
            self.y[tile.columns].contiguous(),
            self.scale,
            shift,
            row_weights.contiguous(),
            column_weights.contiguous(),
            self._positive_columns(tile),
            *(gradients.get(name, nothing) for name in names[0]),
            *(outputs.get(name, nothing) for name in names[1]),
            height,
            width,
            rows.shape[1],
        ]
        exact = rows.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        _tile[grid](
            *arguments,
            precision="ieee" if exact else "tf32",  # which says nothing to half precision
            without=self.without_positives,
            backward=bool(gradients),
            block=BLOCK,
            step=DEPTH,
        )

    def _positive_columns(self, tile: Tile) -> Tensor:
        """Of each row of a tile, in the tile's own count; -1 where it has none there."""
        found = torch.full((tile.shape[0],), -1, dtype=torch.int32, device=self.x.device)
        inside, rest = self.positives.inside(tile), tile.rest.stop - tile.rest.start
        samples = torch.arange(inside.start, inside.stop, device=self.x.device)
        own = samples + self.positives.offset
        rows = (samples - tile.left.start) * rest + own * self.positives.rest_stride - tile.rest.start
        found[rows] = (own * self.positives.stride - tile.columns.start).to(torch.int32)
        return found

    def _add_sums(
        self, tile: Tile, room: Tensor | None, shift: Tensor | None, sums: tuple[Tensor, Tensor], positives: Tensor
    ) -> None:
        height, width = tile.shape
        outputs = {
            "row_sums": self.scale.new_zeros(triton.cdiv(width, BLOCK), height),
            "column_sums": self.scale.new_zeros(triton.cdiv(height, BLOCK), width),
            "positives": self.scale.new_zeros(height),
        }
        self._launch(self._rows(tile), tile, self.scale.new_zeros(()) if shift is None else shift, outputs)
        sums[0][self._flat(tile)] += outputs["row_sums"].sum(dim=0)
        sums[1][tile.columns] += outputs["column_sums"].sum(dim=0)
        mine = self._positive_columns(tile) >= 0
        positives[self.positives.inside(tile)] = outputs["positives"][mine]

    def _gradient(
        self, tile: Tile, rows: Tensor, shift: Tensor, sides: tuple[Tensor, Tensor], positives: Tensor
    ) -> Tensor:
        flat, inside = self._flat(tile), self.positives.inside(tile)
        own = self.scale.new_zeros(tile.shape[0])
        own[self._positive_columns(tile) >= 0] = positives[inside]
        out = self._buffer("gradient", tile.shape, rows.dtype)
        gradients = {"of_rows": sides[0][flat], "of_columns": sides[1][tile.columns], "of_positives": own}
        self._launch(rows, tile, shift, {"out": out}, **{name: g.contiguous() for name, g in gradients.items()})
        return out
