"""Encoder of multichannel series, as electrocardiograms or inertial sensors give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.encoders.base import Encoder
from mmrep.encoders.float32 import Statistics
from mmrep.errors import ConfigError, DataError


@dataclass(frozen=True)
class FixedSeries:
    """An array ``[channels, T]`` to float32 ``[channels, length]``: cut, or padded with NaN, which means "not measured".

    Args:
        channels: Of the array.
        length: Of the result, in samples.
        window: Whether a longer series is cut at a random place, and not at its end.
    """

    channels: int
    length: int
    window: bool = False

    def __call__(self, array: np.ndarray) -> Tensor:
        if array.ndim != 2 or array.shape[0] != self.channels:
            raise DataError(
                f"an array {list(array.shape)} where [{self.channels}, time] is expected",
                fix="set channels in the config, or store the series with the channels first",
            )
        spare = array.shape[1] - self.length
        start = int(torch.randint(0, spare + 1, (1,))) if self.window and spare > 0 else 0
        series = torch.from_numpy(array[:, start : start + self.length].astype(np.float32))
        return F.pad(series, (0, max(0, -spare)), value=torch.nan)


class SeriesEncoder(Encoder):
    """A residual network over time (He et al. 2016, in one dimension, with GroupNorm); mean and maximum over the series.

    Values that are not finite count as not measured: they become the mean, 0 after standardisation. So do those above 65504
    with ``trainer.precision: 16-true``, where a series arrives in fp16.

    Args:
        embed_dim: Width of the embedding space.
        channels: Of the array ``[channels, time]``: 12 for an electrocardiogram, 6 for an inertial sensor.
        length: In samples; series are cut or padded to it.
        width: Channels after the first convolution; they double with each stage after the first. A multiple of 8.
        stages: Each halves the time.
        blocks: Residual blocks of a stage.
        kernel: Width of the convolutions, odd.
        mean: Of each channel. With ``std`` it standardises all series alike; without, each channel of each series is
            standardised by its own mean and deviation, so that offset and amplitude do not matter.
        std: Of each channel, above 0.
        random_window: Whether training takes a random window of a series that is longer than ``length``.
        **head: ``projection``, ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.

    Raises:
        ConfigError: On sizes that make no network, or statistics that do not fit ``channels``.
    """

    kind = "array"

    def __init__(
        self,
        embed_dim: int,
        channels: int = 12,
        length: int = 1000,
        width: int = 32,
        stages: int = 4,
        blocks: int = 1,
        kernel: int = 7,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        random_window: bool = False,
        **head: Any,
    ) -> None:
        if min(channels, length, stages, blocks) < 1 or width < 8 or width % 8 or kernel < 1 or kernel % 2 == 0:
            raise ConfigError(
                f"a series encoder of {channels=}, {length=}, {width=}, {stages=}, {blocks=}, {kernel=}",
                fix="all are at least 1, width a multiple of 8, kernel odd",
            )
        if (mean is None) != (std is None) or any(len(v) != channels for v in (mean, std) if v is not None):
            raise ConfigError(f"mean and std must both have {channels} entries, one a channel, or neither be given")
        if std is not None and min(std) <= 0:
            raise ConfigError(f"std of channel {std.index(min(std))} is {min(std)}, and must be above 0")
        sizes = {"channels": channels, "length": length, "width": width, "stages": stages, "blocks": blocks}
        settings = {**sizes, "kernel": kernel, "mean": mean, "std": std, "random_window": random_window}
        widths = [width * 2**stage for stage in range(stages)]
        super().__init__(embed_dim, 2 * widths[-1], settings, **head)
        self.channels, self.length, self.random_window, self.given = channels, length, random_window, mean is not None
        self.statistics = Statistics(channels, mean, std)
        # Without a norm, and shortcuts have none: what ``mean`` and ``std`` leave of the amplitude reaches the output.
        stem = nn.Sequential(nn.Conv1d(channels, width, kernel, padding=kernel // 2), nn.GELU())
        residual = [
            Block1d((widths[max(0, s - 1)] if b == 0 else w), w, kernel, stride=2 if b == 0 else 1)
            for s, w in enumerate(widths)
            for b in range(blocks)
        ]
        self.backbone = nn.Sequential(stem, *residual)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return FixedSeries(self.channels, self.length, train and self.random_window)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.channels, self.length)

    def features(self, inputs: Tensor) -> Tensor:
        over_time = self.backbone(self.standardize(inputs))
        return torch.cat([over_time.mean(dim=2), over_time.amax(dim=2)], dim=1)

    def standardize(self, series: Tensor) -> Tensor:
        """``[B, channels, length]`` to mean 0 and deviation 1 over what is known, 0 elsewhere."""
        known = series.isfinite()
        values = series.masked_fill(~known, 0.0).to(torch.promote_types(series.dtype, torch.float32))
        if self.given:
            scaled = (values - self.statistics.mean[:, None]) / self.statistics.std[:, None]
            return scaled.masked_fill(~known, 0.0).to(series.dtype)
        count = known.sum(dim=2, keepdim=True).clamp(min=1)
        centred = (values - values.sum(dim=2, keepdim=True) / count).masked_fill(~known, 0.0)
        deviation = (centred.square().sum(dim=2, keepdim=True) / count).sqrt()
        # A constant channel stays 0: what rounding leaves of it is far below this floor.
        return (centred / (deviation + 1e-6 + 1e-5 * values.abs().amax(dim=2, keepdim=True))).to(series.dtype)

    def layers(self) -> list[list[nn.Parameter]]:
        return [list(block.parameters()) for block in self.backbone]


class Block1d(nn.Module):
    """Two convolutions beside a shortcut: ``[B, before, T]`` to ``[B, after, T / stride]``."""

    def __init__(self, before: int, after: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv1d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.GroupNorm(8, after),
            nn.GELU(),
            nn.Conv1d(after, after, kernel, padding=kernel // 2, bias=False),
            nn.GroupNorm(8, after),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv1d(before, after, 1, stride=stride)

    def forward(self, series: Tensor) -> Tensor:
        return F.gelu(self.convolutions(series) + self.shortcut(series))
