"""The multilinear inner product of Symile: ``<r_1, ..., r_M> = sum_k prod_m r_m[k]``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def elementwise_product(rows: Sequence[Tensor]) -> Tensor:
    """The product of M tensors of one shape, in at least fp32: in fp16 the product of unit rows underflows to zero."""
    product = in_fp32(rows[0])
    for factor in rows[1:]:
        product = product * in_fp32(factor)
    return product


def all_combinations(rows: Sequence[Tensor]) -> Tensor:
    """Products of every combination of rows.

    Args:
        rows: K tensors ``[N, D]``.

    Returns:
        ``[N^K, D]``: entry ``(j_1, ..., j_K)``, the last index running fastest, is ``prod_k rows[k][j_k]``.
    """
    products = in_fp32(rows[0])
    for factor in rows[1:]:
        products = (products[:, None, :] * in_fp32(factor)[None, :, :]).flatten(0, 1)
    return products


def in_fp32(rows: Tensor) -> Tensor:
    """Half precision widened to fp32; float64 stays."""
    return rows if rows.dtype == torch.float64 else rows.float()
