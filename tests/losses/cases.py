"""Inputs that the loss tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_rows(names: Sequence[str], n: int, d: int, seed: int = 0) -> dict[str, Tensor]:
    """Random rows of length 1, float64 ``[n, d]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1) for name in names}


def random_presence(names: Sequence[str], n: int, seed: int = 0, share: float = 0.7) -> dict[str, Tensor]:
    """Which rows are there, at random."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {name: torch.rand(n, generator=generator) < share for name in names}
