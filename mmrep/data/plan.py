"""Which samples, in which order, on which rank: a pure function of (number of samples, seed, epoch, world)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from mmrep.errors import ConfigError, DataError

PADDING = -1
"""The number that stands for no sample, in the last batch of an evaluation."""


@dataclass(frozen=True)
class Plan:
    """The global batches of every epoch; a rank takes its slice of each, so that all ranks have equally many.

    Args:
        num_samples: Samples of the split.
        global_batch_size: Rows of one step over all ranks together. The order of the samples depends on nothing else
            than this, the seed and the epoch: the same run on more ranks sees the same global batches.
        seed: Of the order.
        train: A training epoch is a permutation of all samples without its remainder; an evaluation takes each sample
            once, in order, and fills the last batch with `PADDING`.
    """

    num_samples: int
    global_batch_size: int
    seed: int
    train: bool

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"a global batch of {self.global_batch_size} samples", where="data.global_batch_size")
        if self.train and self.num_samples < self.global_batch_size:
            raise DataError(
                f"the training split has {self.num_samples} samples, fewer than one global batch of {self.global_batch_size}",
                fix="lower data.global_batch_size",
            )

    @property
    def num_batches(self) -> int:
        """Batches of one epoch, the same on every rank."""
        rest = 0 if self.train else self.global_batch_size - 1
        return (self.num_samples + rest) // self.global_batch_size

    def batches(self, epoch: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Sample numbers ``[num_batches, global_batch_size / world]`` of one rank.

        Raises:
            ConfigError: If the ranks cannot share a global batch equally.
        """
        if self.global_batch_size % world:
            raise ConfigError(
                f"a global batch of {self.global_batch_size} cannot be shared by {world} ranks",
                where="data.global_batch_size",
            )
        order = self._order(epoch)
        share = self.global_batch_size // world
        return order.reshape(self.num_batches, world, share)[:, rank]

    def _order(self, epoch: int) -> np.ndarray:
        slots = self.num_batches * self.global_batch_size
        if self.train:
            return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)[:slots]
        padding = np.full(slots - self.num_samples, PADDING)
        return np.concatenate([np.arange(self.num_samples), padding])


class PlanSampler(Sampler[list[tuple[int, int]]]):
    """Feeds a DataLoader with the plan: each batch is a list of ``(epoch, sample number)``.

    Args:
        plan: The plan.
        epoch: Asked at the start of each pass.
        rank: Of this process.
        world: Number of processes.
    """

    def __init__(self, plan: Plan, epoch: Callable[[], int] = lambda: 0, rank: int = 0, world: int = 1) -> None:
        self.plan, self.epoch, self.rank, self.world = plan, epoch, rank, world
        plan.batches(0, rank, world)  # a world that does not divide the batch is found now, not at the first step

    def __len__(self) -> int:
        return self.plan.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch()
        for batch in self.plan.batches(epoch, self.rank, self.world):
            yield [(epoch, int(number)) for number in batch]
