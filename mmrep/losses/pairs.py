"""Which pairs of modalities a loss contrasts, and with which weights."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmrep.errors import ConfigError, LossError, did_you_mean
from mmrep.losses.checks import check_name

PairSpec = str | list[str] | dict[str, float]
"""``all``, or names ``a-b``, or names with weights."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of a loss.

    Attributes:
        weights: ``(a, b)`` -> weight; None stands for all pairs of whatever modalities come, or all with the anchor.
        anchor: The modality that every pair has, if any.
    """

    weights: Mapping[tuple[str, str], float] | None
    anchor: str | None

    @classmethod
    def parse(cls, pairs: PairSpec, anchor: str | None, modalities: Sequence[str] | None) -> Pairs:
        """Read the settings of a loss.

        Args:
            pairs: ``all``, a list of ``a-b``, or ``{a-b: weight}``.
            anchor: Only pairs with this modality.
            modalities: All modalities, where they are known.

        Raises:
            ConfigError: If there is no pair, or one is misspelt, unknown, doubled, or weighted by no positive number.
        """
        if anchor is not None:
            check_name(anchor, modalities, "anchor")
        if pairs == "all":
            return cls(None, anchor)
        if isinstance(pairs, str):
            raise ConfigError(f"pairs={pairs!r}", fix="write 'all', a list of a-b, or a mapping of a-b to weights")
        if anchor is not None or not pairs:
            raise ConfigError(f"pairs={pairs} and anchor={anchor!r}", fix="name some pairs, or an anchor, not both")
        weights: dict[tuple[str, str], float] = {}
        for text, weight in pairs.items() if isinstance(pairs, dict) else ((text, 1.0) for text in pairs):
            pair = _parse_pair(text, modalities)
            if pair in weights or pair[::-1] in weights:
                raise ConfigError(f"the pair {text} is named twice")
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"the weight of {text} is {weight}", fix="weights are positive numbers")
            weights[pair] = float(weight)
        return cls(weights, None)

    def of(self, names: Sequence[str]) -> dict[tuple[str, str], float]:
        """The pairs of a batch's modalities, with weights.

        Raises:
            LossError: If a pair names a modality that the batch does not know.
        """
        for name in (self.anchor,) if self.anchor else {name for pair in self.weights or () for name in pair}:
            if name not in names:
                raise LossError(f"the loss contrasts '{name}', which does not come", fix=did_you_mean(name, names))
        if self.weights is not None:
            return dict(self.weights)
        return {pair: 1.0 for pair in itertools.combinations(names, 2) if self.anchor in (None, *pair)}


def _parse_pair(text: str, modalities: Sequence[str] | None) -> tuple[str, str]:
    names = text.split("-")
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ConfigError(f"'{text}' is no pair", fix="write two modalities as image-text")
    for name in names:
        check_name(name, modalities, f"pair {text}")
    return names[0], names[1]


def cover(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Modalities of which each pair has at least one: those whose rows must travel. Few of them, the most shared first."""
    left, found = list(pairs), []
    while left:
        counts = Counter(name for pair in left for name in pair)
        found.append(max(counts, key=lambda name: counts[name]))
        left = [pair for pair in left if found[-1] not in pair]
    return found
