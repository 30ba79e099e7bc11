"""The order in which the samples of one dataset come: shards permuted, cut into windows, samples permuted in the window.

A window is what is in memory (and, of remote shards, on disk) at a time; only shards of one window mix. Everything is a pure
function of a seed and a place: any part of any pass can be had without the parts before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mmrep.data.apportion import apportion, interleave


def permutation(n: int, *key: int | str | None) -> np.ndarray:
    """A permutation of ``n`` that depends on ``key`` alone.

    The order of Philox' raw numbers, which its definition fixes; NumPy's own ``permutation`` may change with its version,
    and a run must be able to go on under another one.
    """
    words = " ".join(str(word) for word in key)
    digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
    stream = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)
    order: np.ndarray = np.argsort(stream, kind="stable")
    return order


@dataclass(frozen=True)
class Contents:
    """What the plan must know of a dataset: how many samples of which modality set each shard has.

    Attributes:
        counts: ``[shards, sets]``: samples of each modality set in each shard.
        sets: The modality sets, a bit for each modality of the run.
        sets_of: Shard -> the modality set of each of its samples, in order; None where all have the same.
    """

    counts: np.ndarray
    sets: tuple[int, ...] = (0,)
    sets_of: Callable[[int], np.ndarray] | None = None

    @classmethod
    def uniform(cls, shard_sizes: Sequence[int]) -> Contents:
        """Of shards in which all samples have the same modalities."""
        return cls(np.asarray(shard_sizes, dtype=np.int64).reshape(-1, 1))

    @cached_property
    def starts(self) -> np.ndarray:
        """``[shards + 1]``: the number of each shard's first sample."""
        starts: np.ndarray = np.concatenate([[0], np.cumsum(self.counts.sum(axis=1))])
        return starts

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard_of(self, number: int) -> int:
        """The shard that holds a sample."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def sets_at(self, numbers: np.ndarray) -> np.ndarray:
        """The modality sets of samples."""
        found = np.full(len(numbers), self.sets[0], dtype=np.int64)
        if self.sets_of is None:
            return found
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            found[chosen] = self.sets_of(shard)[numbers[chosen] - self.starts[shard]]
        return found

    def members(self, shard: int, kind: int | None = None) -> np.ndarray:
        """Numbers of the samples of a shard, or of those with the modality set ``sets[kind]``."""
        numbers = np.arange(self.starts[shard], self.starts[shard + 1])
        if kind is None or self.sets_of is None:
            return numbers
        kept: np.ndarray = numbers[self.sets_of(shard) == self.sets[kind]]
        return kept


class Order:
    """The order of a dataset's samples, or of those with one modality set.

    Args:
        contents: The dataset.
        seed: Of the order.
        part: Number of the dataset among those that are blended.
        window: Shards in a window.
        kind: Take only samples with the modality set ``contents.sets[kind]``.
    """

    def __init__(self, contents: Contents, seed: int, part: int, window: int, kind: int | None = None) -> None:
        self.contents, self.seed, self.part, self.window, self.kind = contents, seed, part, window, kind
        counts = contents.counts
        self._sizes: np.ndarray = counts.sum(axis=1) if kind is None else counts[:, kind]
        self._shards = lru_cache(maxsize=2)(self._permuted_shards)
        self._numbers = lru_cache(maxsize=3)(self._permuted_samples)

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self.contents, self.seed, self.part, self.window, self.kind)  # without what is remembered

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def take(self, cycle: int, start: int, stop: int) -> np.ndarray:
        """Numbers of the samples from place ``start`` to ``stop`` of pass ``cycle``."""
        _, ends = self._shards(cycle)
        pieces = []
        while start < stop:
            window = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[window - 1]) if window else 0
            until = min(stop, int(ends[window]))
            pieces.append(self._numbers(cycle, window)[start - begin : until - begin])
            start = until
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def window_around(self, cycle: int, number: int) -> np.ndarray:
        """The samples of the window that a sample is in, in their order."""
        return self._numbers(cycle, self._place_of(cycle, self.contents.shard_of(number)) // self.window)

    def shards_from(self, cycle: int, shard: int) -> list[int]:
        """The shards of the window that a shard is in, and of the next one."""
        begin = self._place_of(cycle, shard) // self.window * self.window
        shards = self._shards(cycle)[0][begin : begin + 2 * self.window].tolist()
        if begin + self.window >= len(self._sizes):
            shards += self._shards(cycle + 1)[0][: self.window].tolist()
        return list(dict.fromkeys(shards))

    def _place_of(self, cycle: int, shard: int) -> int:
        return int(np.flatnonzero(self._shards(cycle)[0] == shard)[0])

    def _permuted_shards(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of a pass, and where each window ends."""
        # Not keyed by the modality set: the orders of all sets pass through the same shards at about the same time.
        shards = permutation(len(self._sizes), self.seed, self.part, cycle, "shards")
        ends = np.cumsum(self._sizes[shards])
        last = np.arange(self.window - 1, len(ends) + self.window - 1, self.window).clip(max=len(ends) - 1)
        return shards, ends[np.unique(last)]

    def _permuted_samples(self, cycle: int, window: int) -> np.ndarray:
        shards = self._shards(cycle)[0][window * self.window : (window + 1) * self.window]
        numbers = np.concatenate([self.contents.members(shard, self.kind) for shard in shards.tolist()])
        mixed: np.ndarray = numbers[permutation(len(numbers), self.seed, self.part, cycle, window, self.kind)]
        return mixed


class StratifiedOrder:
    """All samples of a dataset, each modality set spread evenly over the pass.

    Args:
        orders: One `Order` for each modality set.
    """

    def __init__(self, orders: Sequence[Order]) -> None:
        self.orders = [order for order in orders if len(order)]
        self.weights = [len(order) for order in self.orders]

    def __len__(self) -> int:
        return sum(self.weights)

    def take(self, cycle: int, start: int, stop: int) -> np.ndarray:
        """As `Order.take`."""
        before, after = apportion(start, self.weights), apportion(stop, self.weights)
        numbers = np.zeros(stop - start, dtype=np.int64)
        streams = interleave(before, after, self.weights)
        for stream, order in enumerate(self.orders):
            numbers[streams == stream] = order.take(cycle, before[stream], after[stream])
        return numbers
