"""Linear probe by stochastic gradient descent: logistic regression, all weight decays of a sweep at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrep.evaluation.probe import Labelled, ProbeData, accuracy_of

WEIGHT_DECAYS = (0.0, *(10.0**exponent for exponent in range(-6, 0)))
BATCH, MOMENTUM, RATE = 1024, 0.9, 1.0
"""The rate is for features whose covariance has a largest eigenvalue of 1. The loss then has a curvature of at most 1/2, and
steps are stable up to a rate of ``2 (1 + momentum) / (1/2)`` = 7.6."""


def sgd_probe(
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    steps: int = 2000,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    seed: int = 0,
) -> dict[str, Any]:
    """Softmax regression by SGD with momentum and a cosine schedule; the weight decay is the one that is best on ``val``.

    Minimises ``mean cross-entropy + weight_decay / 2 |W|^2``, the bias not decayed, over features that are standardised by
    ``train`` and scaled so that the largest eigenvalue of their covariance is 1. The sweep is trained together on the same
    batches. The same seed gives the same figures.

    Args:
        train, val, test: Samples to fit on, to choose on, to report on.
        steps: Of SGD, with batches of up to 1,024 samples.
        weight_decays: The sweep.
        seed: Of the order of the samples.

    Returns:
        As `mmrep.evaluation.probe.linear_probe`, with ``weight_decay`` in place of ``l2``.

    Raises:
        MmrepError: If a split has no labelled sample, or features are not finite.
    """
    data = ProbeData.of(train, val, test)
    x, validation, held_out = (split.float() for split in data.standardized())
    largest = float(torch.linalg.eigvalsh((x.T @ x if len(x) >= x.shape[1] else x @ x.T).double() / len(x)).max())
    scale = 1 / math.sqrt(largest) if largest > 0 else 1.0
    weights = fit_softmax(scale * x, data.train.classes, data.num_classes, steps, weight_decays, seed)
    best = max(
        range(len(weight_decays)),
        key=lambda n: (accuracy_of(_scores(scale * validation, weights[n]), data.val.classes), weight_decays[n]),
    )  # of equals, the stronger decay
    scores = [_scores(scale * split, weights[best]) for split in (validation, held_out)]
    return data.figures(*scores) | {"weight_decay": weight_decays[best]}


def fit_softmax(
    x: Tensor, classes: Tensor, num_classes: int, steps: int, weight_decays: Sequence[float], seed: int
) -> Tensor:
    """Weights ``[S, F + 1, C]`` for S weight decays; the last row is the bias.

    Args:
        x: ``[N, F]``.
        classes: int64 ``[N]``.
        num_classes: C.
        steps: Of SGD.
        weight_decays: S of them.
        seed: Of the order of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    n, width = x.shape
    x = torch.cat([x, torch.ones(n, 1)], dim=1)
    decay = torch.tensor(weight_decays).view(-1, 1, 1).repeat(1, width + 1, 1)
    decay[:, -1] = 0
    weights = torch.zeros(len(weight_decays), width + 1, num_classes)
    velocity, order = torch.zeros_like(weights), torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        if len(order) < min(BATCH, n):
            order = torch.cat([order, torch.randperm(n, generator=generator)])
        batch, order = order[:BATCH], order[BATCH:]
        errors = (x[batch] @ weights).softmax(dim=2)
        errors[:, torch.arange(len(batch)), classes[batch]] -= 1
        gradient = x[batch].T @ errors / len(batch) + decay * weights
        velocity = MOMENTUM * velocity + gradient
        weights -= RATE * 0.5 * (1 + math.cos(math.pi * step / steps)) * velocity
    return weights


def _scores(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]
