"""The two directions in which embeddings of all modalities vary most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """Rows in the plane of the first two principal components.

    Attributes:
        points: Modality -> fp64 ``[n, 2]`` of the rows that are there.
        shares: Of the variance, that each of the two has.
    """

    points: dict[str, Tensor]
    shares: tuple[float, float]


def project(rows: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Projection:
    """Principal components of all modalities together, from the covariance in fp64; each component's sign is such that its
    largest weight is positive, so that the same rows give the same picture.

    Args:
        rows: Modality -> ``[N, D]``, D at least 2.
        present: Modality -> bool ``[N]``; at least one row is there.
    """
    there = {name: r[present[name]].double() for name, r in rows.items()}
    everything = torch.cat(list(there.values()))
    centre = everything.mean(dim=0)
    centred = everything - centre
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(centred))  # ascending
    plane = axes[:, [-1, -2]]
    plane = plane * plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)).sign()
    total = float(variances.sum())
    first, second = (float(variances[place]) / total if total > 0 else 0.0 for place in (-1, -2))
    return Projection({name: (r - centre) @ plane for name, r in there.items()}, (first, second))
