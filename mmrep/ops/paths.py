"""Which way a kernel goes: a function of shapes and types that can be asked, and never has to be."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from mmrep.errors import check_choice

PATHS = ("dense", "cached", "tiled", "triton")
DENSE_ENTRIES = 256 * 256
"""Logits up to which one plain tensor is faster than tiles: there Python's own time dominates."""

CACHE_BYTES = 256 * 2**20
"""What the exponentials of a loss may take to be kept for its backward pass, instead of being computed again."""

TRITON_IS_THERE = importlib.util.find_spec("triton") is not None
TRITON_ENTRIES = 4096 * 4096
"""Logits from which the Triton kernels are worth their launch, on a GPU."""


@dataclass(frozen=True)
class Path:
    """How a kernel computes.

    Attributes:
        name: ``dense``: the formula in plain PyTorch, all logits at once. ``cached``: tiles, which are kept for the backward
            pass. ``tiled``: tiles, which are computed again there. ``triton``: the same, by one kernel a tile.
        reason: Why, with the numbers that decided.
    """

    name: str
    reason: str


def choose_path(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    terms: int = 1,
    path: str | None = None,
) -> Path:
    """The way for ``rows x columns`` logits.

    Args:
        rows, columns: Of this rank.
        dtype: Of the embeddings.
        device: Where they are; on a GPU Triton may be used, where the environment says ``MMREP_TRITON=1``.
        terms: How many such matrices the loss has, which share what may be kept.
        path: What the caller insists on, as tests and benchmarks do.

    Raises:
        ConfigError: On an unknown path.
    """
    if path is not None:
        check_choice("path", path, PATHS)
        return Path(path, "asked for")
    entries = rows * columns
    size = entries * (8 if dtype == torch.float64 else 4)
    budget = CACHE_BYTES // terms
    if entries <= DENSE_ENTRIES:
        return Path("dense", f"{rows} x {columns} logits are few")
    if _triton_is_wanted(device) and dtype != torch.float64 and entries >= TRITON_ENTRIES:
        return Path("triton", f"{rows} x {columns} logits on a GPU, and MMREP_TRITON=1")
    if size > budget:
        return Path("tiled", f"{size >> 20} MiB of logits are more than the {budget >> 20} that may be kept")
    if dtype == torch.float64:
        return Path("dense", f"float64, and {size >> 20} MiB of logits fit: plain formulas, to all digits")
    return Path("cached", f"{size >> 20} MiB of logits fit into the {budget >> 20} that may be kept")


def _triton_is_wanted(device: torch.device | None) -> bool:
    """Only on demand: its kernels pass their tests in Triton's interpreter, and have not been run on a GPU."""
    return TRITON_IS_THERE and device is not None and device.type == "cuda" and os.environ.get("MMREP_TRITON") == "1"
