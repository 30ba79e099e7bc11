"""Sharing slots among streams in proportion to their weights: Sainte-Laguë's rule, at any place without a walk to it.

Item ``j`` of a stream of weight ``w`` has its turn at time ``(2j + 1) / w``; the streams are merged by time, ties in the order
of the streams. What the first ``n`` slots hold is then a function of ``n`` alone, never falls as ``n`` grows, and equals
``n * w / sum(weights)`` wherever all of these are whole numbers. Weights are integers, so nothing is rounded.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def apportion(slots: int, weights: Sequence[int]) -> list[int]:
    """How many of the first ``slots`` slots each stream has.

    Args:
        slots: At least 0.
        weights: Positive integers.
    """
    total = sum(weights)
    # Everything due up to a time that surely is not too late, then one by one.
    time = max(0, slots - len(weights))
    counts = [(2 * time * weight + total) // (2 * total) for weight in weights]
    turns = [
        (Fraction(2 * count + 1, weight), number)
        for number, (count, weight) in enumerate(zip(counts, weights, strict=True))
    ]
    heapq.heapify(turns)
    for _ in range(slots - sum(counts)):
        turn, number = turns[0]
        counts[number] += 1
        heapq.heapreplace(turns, (turn + Fraction(2, weights[number]), number))
    return counts


def interleave(before: Sequence[int], after: Sequence[int], weights: Sequence[int]) -> np.ndarray:
    """The streams of the slots between two places, by the time of their turns.

    Args:
        before, after: What `apportion` gave for the two places.
        weights: As there.

    Returns:
        Numbers of streams ``[sum(after) - sum(before)]``.
    """
    items = [np.arange(first, last, dtype=np.float64) for first, last in zip(before, after, strict=True)]
    turns = np.concatenate([(2 * item + 1) / weight for item, weight in zip(items, weights, strict=True)])
    streams = np.repeat(np.arange(len(weights)), [len(item) for item in items])
    ordered: np.ndarray = streams[np.argsort(turns, kind="stable")]
    return ordered


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the proportion of decimal weights: ``[0.3, 0.7]`` gives ``[3, 7]``."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    return [weight // math.gcd(*whole) for weight in whole]
