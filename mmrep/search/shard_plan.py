"""`ShardPlan`: every sample once, in batches that do not reach over the end of a shard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmrep.data.plan import PADDING, Plan


@dataclass(frozen=True)
class ShardPlan(Plan):
    """The order of an evaluation, but each shard fills its last batch with `mmrep.data.plan.PADDING`.

    So a sample is always in the same batch as the same others: its embedding does not depend, not even in the last bit, on
    which shards come before its own.
    """

    @cached_property
    def sizes(self) -> np.ndarray:
        """Samples of each shard of the one dataset, int64 ``[S]``."""
        sizes: np.ndarray = self.contents[0].counts.sum(axis=1)
        return sizes

    @cached_property
    def num_batches(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def global_batch(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        size = self.global_batch_size
        shard = int(np.searchsorted(self._ends, number, side="right"))
        within = number - int(self._ends[shard] - self.batches_of(int(self.sizes[shard])))
        places = np.arange(within * size, (within + 1) * size)
        samples = np.where(places < self.sizes[shard], places + int(self.sizes[:shard].sum()), PADDING)
        none = np.zeros(size, dtype=np.int64)
        return none, none, samples

    def batches_of(self, samples: int) -> int:
        """How many batches a shard of so many samples is."""
        return -(-samples // self.global_batch_size)

    @cached_property
    def _ends(self) -> np.ndarray:
        ends: np.ndarray = np.cumsum([self.batches_of(int(size)) for size in self.sizes])
        return ends
