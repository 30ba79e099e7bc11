"""`ShardFiles`: bytes of the shards of a split, from the disk or through the cache of remote ones."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mmrep.data.index import Shard
from mmrep.data.locations import is_url, join
from mmrep.data.shard_cache import ShardCache, retried
from mmrep.errors import DataError

MOST_OPEN = 64
"""Local shards that a process keeps open."""
MOST_OPEN_REMOTE = 1
"""A file that the cache has dropped holds its room on the disk as long as it is open."""


class ShardFiles:
    """Random access to shards.

    Args:
        root: Folder or URL of the shards.
        shards: Which; they are named by their place in this list.
        cache: Where remote ones are kept.

    Raises:
        DataError: If a local one is missing, or has another size than the index says.
    """

    def __init__(self, root: str, shards: Sequence[Shard], cache: ShardCache | None = None) -> None:
        self.root, self.shards, self.remote = root, shards, is_url(root)
        self.cache = (cache or ShardCache()) if self.remote else None
        self._whole: set[int] = set()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        for shard in () if self.remote else shards:
            _check_size(Path(root) / shard.name, shard.bytes)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes of a shard.

        Raises:
            DataError: If the disk or network fails for good, or the file ends before.
        """

        if offset + size > self.shards[shard].bytes:
            raise DataError(
                f"the index places a member at byte {offset}, past the end of its shard",
                where=self.shards[shard].name,
                fix="make the index anew: mmrep data index",
            )

        try:
            return self._read(shard, offset, size)
        except OSError:  # only now what costs more than a read from memory
            return retried(lambda: self._read(shard, offset, size), join(self.root, self.shards[shard].name))

    def prefetch(self, shard: int) -> None:
        """Bring a remote shard here."""
        if self.cache is not None:
            self.local_path(shard)

    def local_path(self, shard: int) -> Path:
        """A shard as a file of this machine."""
        entry = self.shards[shard]
        if self.cache is None:
            return Path(self.root) / entry.name
        return self.cache.get(join(self.root, entry.name), entry.sha256, entry.bytes)

    def refetch_if_damaged(self, shard: int) -> bool:
        """Fetch a remote shard again whose copy here has changed; says whether it had. A local one is what it is."""
        if self.cache is None or shard in self._whole:
            return False
        if self.cache.drop_if_damaged(self.shards[shard].sha256):
            self._forget(shard)
            self.prefetch(shard)
            return True
        self._whole.add(shard)  # then the fault is in the data, and the next one needs no look at the whole file
        return False

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            return _read_all(self._descriptor(shard), offset, size)
        except OSError:
            self._forget(shard)  # a stale handle of a network disk heals by opening anew
            raise

    def _descriptor(self, shard: int) -> int:
        # pread has no shared position, so that a descriptor opened before a fork serves all workers.
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        descriptor = self._open_file(shard)
        with self._lock:
            self._open[shard] = descriptor
            while len(self._open) > (MOST_OPEN_REMOTE if self.remote else MOST_OPEN):
                os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _open_file(self, shard: int) -> int:
        if self.cache is None:
            return os.open(self.local_path(shard), os.O_RDONLY)
        while True:
            path = self.local_path(shard)
            with suppress(FileNotFoundError):  # dropped between the two lines by a process that needed the room
                return os.open(path, os.O_RDONLY)

    def _forget(self, shard: int) -> None:
        with self._lock:
            descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, object]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = OrderedDict(), threading.Lock()

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _read_all(descriptor: int, offset: int, size: int) -> bytes:
    """A read may give less than was asked for; it is asked again for the rest, and an end of the file is an error."""
    data = os.pread(descriptor, size, offset)
    if len(data) == size:
        return data
    pieces, got = [data], len(data)
    while got < size:
        if not data:
            raise OSError(
                f"the file ends at byte {offset + got}, {size - got} bytes too early: it changed while it was read"
            )
        data = os.pread(descriptor, size - got, offset + got)
        pieces.append(data)
        got += len(data)
    return b"".join(pieces)


def mismatch(path: object, actual: str, expected: str) -> DataError:
    """The error of a shard that is not the one that was indexed."""
    return DataError(
        f"the shard does not match its index: it has {actual}, the index says {expected}",
        where=path,
        fix="make the index anew: mmrep data index",
    )


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise DataError(
            "the index names a shard that is not there", where=path, fix="copy it here, or make the index anew"
        )
    if (actual := path.stat().st_size) != expected:
        raise mismatch(path, f"{actual} bytes", f"{expected}")
