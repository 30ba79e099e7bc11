"""Encoder of table rows: values on one scale, and bits that say which were measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrep.encoders.features import VectorEncoder, perceptron
from mmrep.encoders.float32 import Statistics
from mmrep.errors import ConfigError


class TabularEncoder(VectorEncoder):
    """A perceptron over a row of a table, NaN where a value was not measured.

    Values are standardised (``mean``, ``std``), or become their percentile among given ``quantiles``, as Symile's laboratory
    values do (Saporta et al. 2024, appendix). A missing value becomes the mean, or the median, and each value comes with a
    bit that says whether it is known.

    With ``trainer.precision: 16-true`` a row arrives in fp16, where a value above 65504 is infinite, and so not measured:
    train such columns with ``16-mixed``, or store them in another unit.

    Args:
        embed_dim: Width of the embedding space.
        size: How many values a row has.
        width: Of the hidden layers and of the output.
        layers: Hidden layers, 1 or more.
        mean: Of each column, over the training rows: see `column_statistics`.
        std: Of each column, above 0.
        quantiles: Of each column, ascending, equally many for all columns: see `column_quantiles`.
        **head: ``projection``, ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.

    Raises:
        ConfigError: If the statistics do not fit ``size``, or both kinds are given.
    """

    def __init__(
        self,
        embed_dim: int,
        size: int = 16,
        width: int = 128,
        layers: int = 2,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        quantiles: list[list[float]] | None = None,
        **head: Any,
    ) -> None:
        _check(size, mean, std, quantiles)
        settings = {"width": width, "layers": layers, "mean": mean, "std": std, "quantiles": quantiles}
        super().__init__(embed_dim, width, size, settings, **head)
        self.statistics = Statistics(size, mean, std, quantiles)
        self.backbone = perceptron(2 * size, width, layers)

    def features(self, inputs: Tensor) -> Tensor:
        known = inputs.isfinite()
        scaled = self.scale(inputs.masked_fill(~known, 0.0)).masked_fill(~known, 0.0)
        features: Tensor = self.backbone(torch.cat([scaled, known.to(scaled.dtype)], dim=1))
        return features

    def scale(self, values: Tensor) -> Tensor:
        """``[B, size]`` to standard deviations from the mean, or to the share of quantiles at or below, less one half."""
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        quantiles = self.statistics.quantiles
        if not (count := quantiles.shape[1]):
            return ((exact - self.statistics.mean) / self.statistics.std).to(values.dtype)
        below = torch.searchsorted(quantiles.to(exact.dtype), exact.T.contiguous(), right=True).T
        return below.to(values.dtype) / count - 0.5


def column_statistics(rows: np.ndarray) -> dict[str, list[float]]:
    """``mean`` and ``std`` of the columns of ``rows [N, size]``, for `TabularEncoder`; NaN is left out.

    A column that is constant, or has no value at all, gets a standard deviation of 1.

    Example:
        >>> TabularEncoder(128, size=3, **column_statistics(rows))
    """
    known = np.isfinite(rows)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, rows, 0.0).sum(axis=0) / count
    std = np.sqrt((np.where(known, rows - mean, 0.0) ** 2).sum(axis=0) / count)
    return {"mean": mean.tolist(), "std": np.where(std > 1e-8 * (1 + np.abs(mean)), std, 1.0).tolist()}


def column_quantiles(rows: np.ndarray, count: int = 100) -> dict[str, list[list[float]]]:
    """``quantiles`` of the columns of ``rows [N, size]``, for `TabularEncoder`; NaN is left out.

    Args:
        rows: Of the training split.
        count: How many for each column, at the middles of equal shares; all 0 for a column without a value.
    """
    shares = (np.arange(count) + 0.5) / count
    columns = (column[np.isfinite(column)] for column in rows.T)
    return {"quantiles": [np.quantile(c, shares).tolist() if len(c) else [0.0] * count for c in columns]}


def _check(size: int, mean: Any, std: Any, quantiles: Any) -> None:
    """Refuse statistics that do not fit."""
    lengths = {"mean": mean, "std": std, "quantiles": quantiles}
    if bad := {name: len(value) for name, value in lengths.items() if value is not None and len(value) != size}:
        raise ConfigError(f"statistics of {bad} columns for rows of size={size}", fix="give one entry a column")
    if (mean is None) != (std is None) or (mean is not None and quantiles is not None):
        raise ConfigError("columns are scaled by mean and std together, or by quantiles", fix="give one of them")
    if std is not None and min(std) <= 0:
        raise ConfigError(f"std of column {std.index(min(std))} is {min(std)}", fix="use 1.0 for a constant column")
    if quantiles is not None and (len(set(map(len, quantiles))) > 1 or any(q != sorted(q) for q in quantiles)):
        raise ConfigError("quantiles must be ascending, and equally many for each column")
