"""Which samples, in which order, on which rank: a pure function of (fingerprint, seed, epoch, global batch).

Nothing here depends on the number of ranks or workers, or on what was loaded before: any batch of any epoch can be had at
once, and the same run on another machine has the same global batches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils.data import Sampler

from mmrep.data.apportion import apportion, interleave, whole_weights
from mmrep.data.order import Contents, Order, StratifiedOrder
from mmrep.errors import ConfigError, DataError, check_choice

PADDING = -1
"""The number that stands for no sample, in the last batch of an evaluation."""

BATCHING = ("mixed", "stratified", "homogeneous")
PLAN_VERSION = 3
"""Changes when the same settings give another order."""


@dataclass(frozen=True)
class PlannedBatch:
    """One rank's share of a global batch.

    Attributes:
        epoch, number: Of the global batch.
        first: The slot of the global batch at which the share begins.
        parts: ``[n]``: which of the blended datasets.
        cycles: ``[n]``: which pass over that dataset.
        samples: ``[n]``: which sample of it; `PADDING` for none.
    """

    epoch: int
    number: int
    first: int
    parts: np.ndarray
    cycles: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class Plan:
    """The global batches of every epoch; a rank takes its slice of each, so that all ranks have equally many.

    Args:
        contents: The dataset, or several that are blended.
        global_batch_size: Rows of one step over all ranks together.
        seed: Of the order.
        train: A training epoch is a permutation of all samples without its remainder; an evaluation takes each sample
            once, in order, and fills the last batch with `PADDING`.
        weights: Share of each dataset in every global batch: exact where it is a whole number of samples. Blended datasets
            begin anew, in another order, when what is left of them is less than their share of a batch; an epoch is as many
            samples as all of them hold.
        batching: ``mixed``: as the samples come. ``stratified``: modality sets spread evenly, so that every global batch
            has its share of each. ``homogeneous``: every global batch of one modality set (and one dataset).
        window: Shards whose samples are mixed at a time.
    """

    contents: Sequence[Contents]
    global_batch_size: int
    seed: int
    train: bool
    weights: Sequence[float] = ()
    batching: str = "mixed"
    window: int = 64

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"a global batch of {self.global_batch_size} samples", where="data.global_batch_size")
        if self.window < 1:
            raise ConfigError(f"a window of {self.window} shards", where="data.window")
        check_choice("data.batching", self.batching, BATCHING)
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ConfigError(f"weights of {list(self.weights)}", where="data.path", fix="weights are above 0")
        if self.train:
            self._check_enough()

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return sum(len(contents) for contents in self.contents)

    @cached_property
    def num_batches(self) -> int:
        """Batches of one epoch, the same on every rank."""
        if not self.train:
            return -(-self.num_samples // self.global_batch_size)
        if self.batching == "homogeneous":
            return sum(sum(batches) for batches in self._batches_by_set)
        return self.num_samples // self.global_batch_size

    def check_world(self, world: int) -> None:
        """Refuse a number of ranks that cannot share a global batch equally.

        Raises:
            ConfigError: If it does not divide the batch.
        """
        if self.global_batch_size % world:
            raise ConfigError(
                f"a global batch of {self.global_batch_size} cannot be shared by {world} ranks",
                where="data.global_batch_size",
            )

    def batches(self, epoch: int, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[PlannedBatch]:
        """One rank's shares of the global batches of an epoch, from batch ``start`` on.

        Raises:
            ConfigError: If the ranks cannot share a global batch equally.
        """
        self.check_world(world)
        share = self.global_batch_size // world
        mine = slice(rank * share, (rank + 1) * share)
        for number in range(start, self.num_batches):
            parts, cycles, samples = self.global_batch(epoch, number)
            yield PlannedBatch(epoch, number, mine.start, parts[mine], cycles[mine], samples[mine])

    def global_batch(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parts, cycles and samples of a global batch, each ``[global_batch_size]``."""
        if not self.train:
            return self._evaluation_batch(number)
        if self.batching == "homogeneous":
            return self._homogeneous_batch(epoch, number)
        return self._blended_batch(epoch, number)

    def spares(self, epoch: int, number: int, slot: int) -> Iterator[int]:
        """Samples that may stand in for the one in a slot, best first: the next ones of its window, dataset and modality set.

        None is in the same global batch, and no two slots of a batch are given the same one as long as there are enough.
        """
        parts, cycles, samples = self.global_batch(epoch, number)
        part, cycle, sample = int(parts[slot]), int(cycles[slot]), int(samples[slot])
        contents = self.contents[part]
        modality_set = contents.sets_at(samples[slot : slot + 1])[0]
        order = self._orders[part][0 if self.batching == "mixed" else contents.sets.index(int(modality_set))]
        pool = order.window_around(cycle, sample)
        pool = np.roll(pool, -int(np.flatnonzero(pool == sample)[0]))
        pool = pool[(contents.sets_at(pool) == modality_set) & ~np.isin(pool, samples[parts == part])]
        first = pool[slot :: self.global_batch_size]
        yield from first.tolist()
        yield from pool[~np.isin(pool, first)].tolist()

    def upcoming_shards(self, batch: PlannedBatch) -> list[tuple[int, int]]:
        """The ``(part, shard)`` of the windows that a batch is in and of the next ones, soonest first: what to fetch ahead."""
        ahead: dict[tuple[int, int], None] = {}
        for part in np.unique(batch.parts[batch.samples != PADDING]).tolist():
            last = np.flatnonzero((batch.parts == part) & (batch.samples != PADDING))[-1]
            cycle, shard = int(batch.cycles[last]), self.contents[part].shard_of(int(batch.samples[last]))
            if self.train:
                shards = self._orders[part][0].shards_from(cycle, shard)
            else:
                shards = list(range(shard, min(shard + 3, len(self.contents[part].counts))))
            ahead |= {(part, following): None for following in shards}
        return list(ahead)

    @cached_property
    def _orders(self) -> list[list[Order]]:
        """Per dataset its orders: one, or one for each modality set."""
        return [
            [
                Order(contents, self.seed, part, self.window, kind)
                for kind in (range(len(contents.sets)) if self.batching != "mixed" else [None])
            ]
            for part, contents in enumerate(self.contents)
        ]

    @cached_property
    def _whole(self) -> list[Order | StratifiedOrder]:
        return [StratifiedOrder(orders) if self.batching == "stratified" else orders[0] for orders in self._orders]

    @cached_property
    def _shares(self) -> list[int]:
        return whole_weights(self.weights or [len(contents) for contents in self.contents])

    @cached_property
    def _batches_by_set(self) -> list[list[int]]:
        """Per dataset and modality set the whole batches of a pass; none of samples without any modality."""
        return [
            [
                len(order) // self.global_batch_size if modality_set or contents.sets == (0,) else 0
                for order, modality_set in zip(orders, contents.sets, strict=True)
            ]
            for orders, contents in zip(self._orders, self.contents, strict=True)
        ]

    def _blended_batch(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = self.global_batch_size
        if len(self.contents) == 1:  # every epoch is one pass, whose remainder is left out
            samples = self._whole[0].take(epoch, number * size, (number + 1) * size)
            return np.zeros(size, dtype=np.int64), np.full(size, epoch), samples
        at = epoch * self.num_batches + number
        before, after = self._held(at), self._held(at + 1)
        parts = interleave(before, after, self._shares)
        cycles, samples = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        for part, order in enumerate(self._whole):
            cycle, begin = self._pass_at(part, at)
            places = (place - self._held(begin)[part] for place in (before[part], after[part]))
            cycles[parts == part], samples[parts == part] = _run_on(order, cycle, *places)
        return parts, cycles, samples

    def _held(self, batches: int) -> list[int]:
        """Samples of each blended dataset in the first ``batches`` batches of all epochs."""
        return apportion(batches * self.global_batch_size, self._shares)

    def _pass_at(self, part: int, batch: int) -> tuple[int, int]:
        """Which pass over a blended dataset a batch is in, and with which batch that pass began.

        A pass ends with the last batch that it fills: none is of two passes, where a sample might come twice and be its own
        negative.
        """
        begins = self._begins[part]
        while begins[-1] <= batch:
            begins.append(self._next_begin(part, begins[-1]))
        cycle = bisect_right(begins, batch) - 1
        return cycle, begins[cycle]

    def _next_begin(self, part: int, begin: int) -> int:
        length, held = len(self._whole[part]), self._held(begin)[part]
        end = begin + max(1, length * sum(self._shares) // (self.global_batch_size * self._shares[part]))
        while end > begin + 1 and self._held(end)[part] - held > length:
            end -= 1
        while self._held(end + 1)[part] - held <= length:
            end += 1
        return end

    @cached_property
    def _begins(self) -> list[list[int]]:
        """Per blended dataset the batches, counted over all epochs, with which its passes begin: those that were asked for."""
        return [[0] for _ in self.contents]

    def _homogeneous_batch(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size, part, cycle, place = self.global_batch_size, 0, epoch, number
        if len(self.contents) > 1:
            at = epoch * self.num_batches + number
            before, after = apportion(at, self._shares), apportion(at + 1, self._shares)
            part = int(interleave(before, after, self._shares)[0])
            cycle, place = divmod(before[part], sum(self._batches_by_set[part]))
        kinds = [kind for kind, batches in enumerate(self._batches_by_set[part]) if batches]
        weights = [self._batches_by_set[part][kind] for kind in kinds]
        before, after = apportion(place, weights), apportion(place + 1, weights)
        chosen = int(interleave(before, after, weights)[0])
        start = before[chosen] * size
        samples = self._orders[part][kinds[chosen]].take(cycle, start, start + size)
        return np.full(size, part), np.full(size, cycle), samples

    def _evaluation_batch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = self.global_batch_size
        ends = np.cumsum([len(contents) for contents in self.contents])
        places = np.arange(number * size, (number + 1) * size)
        real = places < self.num_samples
        parts = np.where(real, np.searchsorted(ends, places, side="right"), 0)
        starts = np.concatenate([[0], ends])[:-1]
        return parts, np.zeros(size, dtype=np.int64), np.where(real, places - starts[parts], PADDING)

    def _check_enough(self) -> None:
        if not self.num_batches:
            each = " of one modality set" if self.batching == "homogeneous" else ""
            raise DataError(
                f"the training split has {self.num_samples} samples, fewer than one global batch of "
                f"{self.global_batch_size}{each}",
                fix="lower data.global_batch_size",
            )
        if len(self.contents) == 1:
            return
        for part, contents in enumerate(self.contents):
            units = sum(self._batches_by_set[part]) if self.batching == "homogeneous" else len(contents)
            share = -(-self.global_batch_size * self._shares[part] // sum(self._shares))
            if not units or (self.batching != "homogeneous" and share > units):
                raise DataError(
                    f"dataset {part + 1} of the blend has {len(contents)} samples, too few for its share of a global batch",
                    where="data.path",
                    fix="lower its weight or data.global_batch_size",
                )


def _run_on(order: Order | StratifiedOrder, cycle: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Cycles and samples from one place of a pass to another, in the next pass where that is beyond the end of this one."""
    length, cycles, samples = len(order), [], []
    while start < stop:
        further, place = divmod(start, length)
        until = min(length, place + stop - start)
        samples.append(order.take(cycle + further, place, until))
        cycles.append(np.full(until - place, cycle + further))
        start += until - place
    empty = [np.zeros(0, dtype=np.int64)]
    return np.concatenate(cycles or empty), np.concatenate(samples or empty)


def from_the_start() -> tuple[int, int]:
    """The first epoch and its first batch."""
    return 0, 0


class PlanSampler(Sampler[PlannedBatch]):
    """Feeds a DataLoader with a rank's share of the plan, a batch at a time.

    Args:
        plan: The plan.
        position: Asked at the start of each pass: the epoch, and the batch of it to begin with.
        rank: Of this process.
        world: Number of processes.
    """

    def __init__(
        self, plan: Plan, position: Callable[[], tuple[int, int]] = from_the_start, rank: int = 0, world: int = 1
    ) -> None:
        self.plan, self.position, self.rank, self.world = plan, position, rank, world
        plan.check_world(world)  # found now, not at the first step

    def __len__(self) -> int:
        return self.plan.num_batches

    def __iter__(self) -> Iterator[PlannedBatch]:
        epoch, start = self.position()
        yield from self.plan.batches(epoch, start, self.rank, self.world)
