"""`OnlineClassifier`: softmax regression on features that come batch by batch, over all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.errors import CheckpointError
from mmrep.ops.gather import sum_over_ranks

SLOWEST = 0.01
"""Least weight of a batch in the running mean and variance: they are those of the last hundred batches or so."""


class OnlineClassifier:
    """A linear classifier by stochastic gradient descent with momentum, equal on all ranks.

    Features are standardised by running statistics, as by the BatchNorm without scale in front of the probes of MAE (He et al.
    2022, appendix A.1), and divided by the square root of their number: the largest eigenvalue of their covariance is then at
    most 1, the loss has a curvature of at most 1/2, and steps are stable up to a rate of ``2 (1 + momentum) / (1/2)`` = 7.6,
    whatever the backbone. A step takes one collective, of ``(F + 1) C + 2 F + 1`` numbers, and none waits for the device.

    Args:
        width: F, of the features.
        num_classes: C.
        lr: Learning rate.
        momentum: Of the steps.
        weight_decay: Of the weights; the bias is not decayed.
    """

    def __init__(
        self, width: int, num_classes: int, *, lr: float = 2.0, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        self.width, self.num_classes = width, num_classes
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.weights = torch.zeros(width + 1, num_classes)  # the last row is the bias
        self.velocity = torch.zeros_like(self.weights)
        self.mean, self.variance = torch.zeros(width), torch.zeros(width)
        self.steps = torch.zeros(())  # batches with a labelled sample; a tensor, so that nothing waits for the device

    def to(self, device: torch.device | str) -> None:
        """Move all of it."""
        self._set({name: tensor.to(device) for name, tensor in self.state_dict().items()})

    def scores(self, features: Tensor) -> Tensor:
        """Scores ``[N, C]`` of features ``[N, F]``."""
        return self._extended(features) @ self.weights

    @torch.no_grad()
    def learn(self, features: Tensor, classes: Tensor) -> None:
        """One step on the labelled samples of all ranks. A collective.

        The first batch gives the mean and variance, and every later one is standardised by those before it.

        Args:
            features: ``[N, F]`` of this rank, fp32.
            classes: int64 ``[N]``; below 0 where a sample is to be left out.
        """
        known = (classes >= 0).float()[:, None]
        x = self._extended(features)
        errors = (x @ self.weights).softmax(dim=1) - F.one_hot(classes.clamp(min=0), self.num_classes)
        shifted = (features - self.mean) * known
        mine = [x.T @ (errors * known), shifted.sum(dim=0), shifted.square().sum(dim=0), known.sum()[None]]
        total = sum_over_ranks(torch.cat([part.flatten() for part in mine]))
        gradient, first, second, count = total.split([part.numel() for part in mine])
        some, count = (count > 0).float(), count.clamp(min=1)
        self._descend(gradient.view_as(self.weights) / count, some * (self.steps > 0))
        self._follow(first / count, second / count, some)
        self.steps = self.steps + some[0]

    def _descend(self, gradient: Tensor, some: Tensor) -> None:
        decayed = torch.cat([self.weights[:-1] * self.weight_decay, torch.zeros_like(self.weights[-1:])])
        velocity = self.momentum * self.velocity + gradient + decayed
        self.velocity = torch.where(some > 0, velocity, self.velocity)
        self.weights = torch.where(some > 0, self.weights - self.lr * velocity, self.weights)

    def _follow(self, first: Tensor, second: Tensor, some: Tensor) -> None:
        """The exact mean and variance of the mixture of what was seen and the batch, from its moments about the mean so far."""
        rate = some * (1 / (self.steps + 1)).clamp(min=SLOWEST)
        spread = (1 - rate) * self.variance + rate * second - (rate * first).square()
        self.mean, self.variance = self.mean + rate * first, spread.clamp(min=0)

    def _extended(self, features: Tensor) -> Tensor:
        """Standardised features and a one ``[N, F + 1]``."""
        floor = 1e-4 * self.variance.mean() + 1e-30  # features that hardly vary are not blown up
        x = (features - self.mean) * (self.width * (self.variance + floor)).rsqrt()
        return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a run needs to go on."""
        return {name: getattr(self, name) for name in ("weights", "velocity", "mean", "variance", "steps")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: If it is of another width, or of other classes.
        """
        if (shape := tuple(state["weights"].shape)) != tuple(self.weights.shape):
            raise CheckpointError(
                f"the checkpoint's online probe has {shape[0] - 1} features and {shape[1]} classes, "
                f"this one {self.width} and {self.num_classes}",
                fix="use its config.yaml",
            )
        self._set({name: tensor.to(self.weights.device) for name, tensor in state.items()})

    def _set(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)
