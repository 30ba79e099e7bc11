"""`Prefetcher`: remote shards that the plan asks for soon come while the present ones are read."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch.utils.data import get_worker_info

from mmrep.data.plan import Plan, PlannedBatch
from mmrep.data.reader import Samples
from mmrep.errors import DataError


class Prefetcher:
    """Downloads ahead in a thread of each loading process, workers sharing the shards among them.

    Args:
        parts: The samples of each dataset; local ones need nothing.
    """

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = parts
        self._thread: threading.Thread | None = None
        self._asked: list[tuple[int, int]] = []

    def look_ahead(self, plan: Plan, batch: PlannedBatch) -> None:
        """Start on what a batch says will be needed, unless a download runs already."""
        if not any(samples.files.remote for samples in self.parts):
            return
        if self._thread is not None and self._thread.is_alive():
            return
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        ahead = self._within_cache(plan.upcoming_shards(batch))[worker::workers]
        if ahead == self._asked:
            return
        self._asked = ahead
        self._thread = threading.Thread(target=self._fetch, args=(ahead,), daemon=True)
        self._thread.start()

    def _within_cache(self, ahead: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """As much as does not push out of the cache what is being read: half of it."""
        kept, total = [], 0
        for part, shard in ahead:
            files = self.parts[part].files
            if files.cache is None:
                continue
            total += files.shards[shard].bytes
            if total > files.cache.max_bytes // 2:
                break
            kept.append((part, shard))
        return kept

    def _fetch(self, ahead: Sequence[tuple[int, int]]) -> None:
        for part, shard in ahead:
            with suppress(DataError):  # the reader will ask for the same shard, and raises
                self.parts[part].files.prefetch(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "_thread": None, "_asked": []}
