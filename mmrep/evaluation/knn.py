"""Classification by the nearest neighbours of frozen features, weighted by similarity (Wu et al. 2018, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.errors import ConfigError
from mmrep.evaluation.probe import Labelled, ProbeData, accuracy_of

NEIGHBOURS = (10, 20, 100, 200)
"""The sweep of DINO (Caron et al. 2021)."""
TEMPERATURE = 0.07
MOST_SIMILARITIES = 1 << 25
"""Similarities held at once."""


def knn_probe(
    train: Labelled,
    val: Labelled,
    test: Labelled,
    *,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Each of the k training samples of the largest cosine s votes for its class with ``exp(s / temperature)``.

    Nothing is fitted. The number k is the one of the sweep that is best on ``val``; one that is larger than the training set
    means all of it.

    Args:
        train, val, test: Samples that vote, to choose on, to report on.
        neighbours: The sweep.
        temperature: Of the votes.

    Returns:
        As `mmrep.evaluation.probe.linear_probe`, with ``k`` in place of ``l2``.

    Raises:
        MmrepError: If a split has no labelled sample, features are not finite, or a setting is not positive.
    """
    if not neighbours or min(neighbours) < 1 or temperature <= 0:
        raise ConfigError(f"neighbours={list(neighbours)} and temperature={temperature} must be positive")
    data = ProbeData.of(train, val, test)
    ks = sorted({min(k, len(data.train.classes)) for k in neighbours})
    votes = knn_votes(data.train, data.val.features, data.num_classes, ks, temperature)
    best = max(ks, key=lambda k: accuracy_of(votes[k], data.val.classes))  # of equals, the fewer
    held_out = knn_votes(data.train, data.test.features, data.num_classes, [best], temperature)
    return data.figures(votes[best], held_out[best]) | {"k": best}


def knn_votes(
    train: Labelled, features: Tensor, num_classes: int, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """For each k the votes ``[N, C]`` for the classes of features ``[N, F]``, up to a factor for each sample.

    In fp32, within autocast too: cosines of half precision, divided by the temperature, give other neighbours.
    """
    with torch.autocast(features.device.type, enabled=False):
        return _votes(train, features, num_classes, ks, temperature)


def _votes(
    train: Labelled, features: Tensor, num_classes: int, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    bank = F.normalize(train.features.float(), dim=1)
    votes: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in F.normalize(features.float(), dim=1).split(max(1, MOST_SIMILARITIES // len(bank))):
        nearest, which = (part @ bank.T).topk(max(ks), dim=1)
        weights = ((nearest - nearest[:, :1]) / temperature).exp()  # of the best 1, so that none overflows
        for k, parts in votes.items():
            none = part.new_zeros(len(part), num_classes)
            parts.append(none.scatter_add_(1, train.classes[which[:, :k]], weights[:, :k]))
    return {k: torch.cat(parts) for k, parts in votes.items()}
