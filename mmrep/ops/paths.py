"""Which way a kernel goes: a function of shapes and types that can be asked, and never has to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmrep.errors import check_choice

PATHS = ("dense", "cached", "tiled")
DENSE_ENTRIES = 256 * 256
"""Logits up to which one plain tensor is faster than tiles: there Python's own time dominates."""

CACHE_BYTES = 256 * 2**20
"""What the exponentials of a loss may take to be kept for its backward pass, instead of being computed again."""


@dataclass(frozen=True)
class Path:
    """How a kernel computes.

    Attributes:
        name: ``dense``: the formula in plain PyTorch, all logits at once. ``cached``: tiles, which are kept for the backward
            pass. ``tiled``: tiles, which are computed again there.
        reason: Why, with the numbers that decided.
    """

    name: str
    reason: str


def choose_path(rows: int, columns: int, dtype: torch.dtype, *, terms: int = 1, path: str | None = None) -> Path:
    """The way for ``rows x columns`` logits.

    Args:
        rows, columns: Of this rank.
        dtype: Of the embeddings.
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
    if size > budget:
        return Path("tiled", f"{size >> 20} MiB of logits are more than the {budget >> 20} that may be kept")
    if dtype == torch.float64:
        return Path("dense", f"float64, and {size >> 20} MiB of logits fit: plain formulas, to all digits")
    return Path("cached", f"{size >> 20} MiB of logits fit into the {budget >> 20} that may be kept")
