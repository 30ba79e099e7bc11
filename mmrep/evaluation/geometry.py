"""How embeddings lie: alignment and uniformity of Wang and Isola, and the modality gap."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 4096


@torch.no_grad()
def geometry(rows: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Figures of rows that are brought to length 1 first.

    Args:
        rows: Modality -> ``[N, D]``.
        present: Modality -> bool ``[N]``.

    Returns:
        For every pair of modalities ``alignment/a-b`` and ``modality_gap/a-b``, for every modality ``uniformity/m``; a figure
        is left out where too few rows are there.
    """
    units = {name: F.normalize(r.float(), dim=1) for name, r in rows.items()}
    figures: dict[str, Tensor] = {}
    for a, b in itertools.combinations(units, 2):
        both = present[a] & present[b]
        if bool(both.any()):
            figures[f"alignment/{a}-{b}"] = alignment(units[a][both], units[b][both])
            figures[f"modality_gap/{a}-{b}"] = modality_gap(units[a][present[a]], units[b][present[b]])
    for name, unit in units.items():
        if int(present[name].sum()) > 1:
            figures[f"uniformity/{name}"] = uniformity(unit[present[name]])
    return figures


def alignment(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of pairs ``[N, D]``: 0 where equal, 2 where unrelated (Wang and Isola 2020, equation 4)."""
    mean: Tensor = (x - y).square().sum(dim=1).mean()
    return mean


def uniformity(x: Tensor) -> Tensor:
    """``log E exp(-2 |x - y|^2)`` over different rows ``[N, D]``: 0 where all are equal, down to -4 where they spread over the
    sphere (Wang and Isola 2020, equation 5). Of more than 4,096 rows, so many evenly spaced ones."""
    chosen = x[torch.linspace(0, len(x) - 1, min(len(x), MOST_ROWS), device=x.device).long()]
    value: Tensor = torch.pdist(chosen).square().mul(-2).exp().mean().log()
    return value


def modality_gap(x: Tensor, y: Tensor) -> Tensor:
    """Distance of the centres of two modalities ``[N, D]`` and ``[K, D]`` (Liang et al. 2022, section 3)."""
    distance: Tensor = (x.mean(dim=0) - y.mean(dim=0)).norm()
    return distance
