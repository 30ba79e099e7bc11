"""Tiles: the parts of a matrix of logits that are in memory at one time, and where its positives stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_TILE, GPU_TILE = 1024, 8192
"""Logits of a side. On CPUs 512 to 2048 are equally fast, 256 costs a third more; GPUs want more work in a call."""


@dataclass(frozen=True)
class Tile:
    """Rows ``x[i] * rest[r]`` for i and r of two ranges, against a range of columns.

    Attributes:
        left: Of the rows of x.
        rest: Of the rows of ``rest``.
        columns: Of the columns.
    """

    left: slice
    rest: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its logits."""
        rest = self.rest.stop - self.rest.start
        return (self.left.stop - self.left.start) * rest, self.columns.stop - self.columns.start


@dataclass(frozen=True)
class Positives:
    """Where sample i's positive stands: at row ``(i, (offset + i) * rest_stride)``, column ``(offset + i) * stride``.

    For two modalities that is the diagonal; for products of several, the combination of the sample with itself.
    """

    offset: int
    rest_stride: int
    stride: int

    def inside(self, tile: Tile) -> slice:
        """Which samples have theirs in a tile."""
        first, last = tile.left.start, tile.left.stop
        for stride, part in ((self.rest_stride, tile.rest), (self.stride, tile.columns)):
            if stride:
                first = max(first, -(-part.start // stride) - self.offset)
                last = min(last, -(-part.stop // stride) - self.offset)
            elif part.start > 0:
                last = first
        return slice(first, max(first, last))

    def of(self, logits: Tensor, tile: Tile) -> Tensor:
        """Their entries in a tile's contiguous logits, as a view."""
        inside = self.inside(tile)
        count, first = inside.stop - inside.start, inside.start
        if not count:
            return logits.flatten()[:0]
        rest, columns = tile.rest.stop - tile.rest.start, logits.shape[1]
        row = (first - tile.left.start) * rest + (self.offset + first) * self.rest_stride - tile.rest.start
        place = row * columns + (self.offset + first) * self.stride - tile.columns.start
        step = (rest + self.rest_stride) * columns + self.stride
        return logits.as_strided((count,), (step,), logits.storage_offset() + place)


def tiles(left: int, rest: int, columns: int, device: torch.device) -> Iterator[Tile]:
    """All tiles, row blocks outside; those of one row block follow each other.

    Args:
        left, rest: The rows are their combinations, rest running fastest.
        columns: How many columns there are.
        device: Where.
    """
    side = GPU_TILE if device.type == "cuda" else CPU_TILE
    rest_block = min(rest, side)
    left_block = max(1, side // max(1, rest_block))
    for i in range(0, left, left_block):
        for r in range(0, rest, rest_block):
            for c in range(0, columns, side):
                yield Tile(
                    slice(i, min(i + left_block, left)),
                    slice(r, min(r + rest_block, rest)),
                    slice(c, min(c + side, columns)),
                )
