"""Batch normalisation over the rows of all ranks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mmrep.ops.gather import gather_rows, row_counts
from mmrep.ops.multilinear import in_fp32


class GatheredBatchNorm(nn.Module):
    """Standardises features by the mean and variance of the global batch (Ioffe and Szegedy 2015, algorithm 1).

    The one layer of mmrep that mixes samples, and off by default. Its statistics are those of the gathered rows, with
    gradients, so that W ranks compute what one process would, also with uneven rows (``torch.nn.SyncBatchNorm`` needs
    CUDA). Rows that stand for absent samples count like any other. Half precision is standardised in fp32.

    Args:
        width: Of the features.
        momentum: Weight of a batch in the running statistics that evaluation uses.
    """

    mixes_samples: ClassVar[bool] = True
    """See `mmrep.encoders.sample_mixing.mixing_layers`."""
    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """``[n, width]`` of this rank to standardised ``[n, width]``."""
        own = in_fp32(features)
        if not self.training:
            return ((own - self.mean) * (self.variance + 1e-5).rsqrt()).to(features.dtype)
        everyone = in_fp32(gather_rows(features, row_counts(len(features), features.device)))
        variance, mean = torch.var_mean(everyone, dim=0, correction=0)
        with torch.no_grad():
            self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
            self.variance.lerp_(variance.to(self.variance.dtype), self.momentum)
        return ((own - mean) * (variance + 1e-5).rsqrt()).to(features.dtype)
