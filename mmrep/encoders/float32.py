"""Numbers that stay in fp32 when the weights become half precision, whose largest number is 65504."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """Base of modules without parameters that move to a device and change no type."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        def moved(tensor: Tensor) -> Tensor:
            there = fn(tensor)
            return there if tensor.is_meta else tensor.to(there.device)

        super()._apply(moved, recurse)
        return self


class Statistics(Float32Buffers):
    """Of the training split's columns. They are settings, and travel as such; buffers only to be on the device."""

    mean: Tensor
    std: Tensor
    quantiles: Tensor

    def __init__(
        self,
        size: int,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        quantiles: list[list[float]] | None = None,
    ) -> None:
        super().__init__()
        given = {"mean": mean or [0.0] * size, "std": std or [1.0] * size, "quantiles": quantiles or [[]] * size}
        for name, values in given.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
