"""Ranks -> the figures of a retrieval table. Pure functions over NumPy arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

KS = (1, 5, 10)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """Share of the queries whose best right answer is among the first ``k``."""
    return float((ranks <= k).mean())


def share_interval(share: float, n: int, *, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a share of n queries or samples: a recall, an accuracy.

    Resampling n zeros and ones with replacement and taking the mean is a binomial draw over n, so that is what is drawn.
    """
    resampled = np.random.default_rng(seed).binomial(n, share, draws) / n
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def summarize(ranks: np.ndarray, *, candidates: int, chance: float) -> dict[str, Any]:
    """The figures of one direction.

    Args:
        ranks: int ``[Q]``, from 1: the place of each query's best right answer.
        candidates: Size of the gallery.
        chance: Recall@1 of a random order.

    Returns:
        Fractions in [0, 1]; None instead of a figure where there is no query.
    """
    figures: dict[str, Any] = {"queries": len(ranks), "candidates": candidates}
    some = len(ranks) > 0
    for k in KS:
        figures[f"recall@{k}"] = recall_at(ranks, k) if some else None
    figures["recall@1_ci95"] = list(share_interval(recall_at(ranks, 1), len(ranks))) if some else None
    figures["mrr"] = math.fsum((1 / ranks).tolist()) / len(ranks) if some else None  # in any order of the ranks
    figures["median_rank"] = float(np.median(ranks)) if some else None
    figures["chance_recall@1"] = chance if some else None
    return figures
