"""`Samples`: random access to the bytes of every sample of a split."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mmrep.data.index import Index, Shard, group_members, sha256
from mmrep.data.tar import Member
from mmrep.errors import DataError


@dataclass(frozen=True, slots=True)
class Location:
    """Where one sample lies: its shard, its key, and its members by extension."""

    shard: Path
    key: str
    members: dict[str, Member]

    def __str__(self) -> str:
        return f"{self.shard.name}:{self.key}"


class Samples:
    """The samples of a split in shard order, each readable by its number.

    The shards are checked against the index when this is made, so that a wrong folder fails before the first step and
    not in the middle of an epoch.

    Raises:
        DataError: If a shard is missing, or is not the one that was indexed.
    """

    def __init__(self, index: Index, split: str) -> None:
        self.index = index
        self.locations: list[Location] = []
        self._files: dict[Path, int] = {}
        for shard in index.split(split):
            path = index.folder / shard.name
            _check_size(path, shard.bytes)
            self.locations.extend(Location(path, key, members) for key, members in _group_checked(path, shard))

    def __len__(self) -> int:
        return len(self.locations)

    def read(self, number: int, extension: str) -> bytes:
        """The bytes of one member of sample ``number``."""
        location = self.locations[number]
        member = location.members[extension]
        data = os.pread(self._descriptor(location.shard), member.size, member.offset)
        if len(data) != member.size:
            raise DataError(
                f"member .{extension} is cut short", where=location, fix="the shard changed while it was read"
            )
        return data

    def extension_of(self, number: int, modality: str) -> str | None:
        """The extension that carries ``modality`` in sample ``number``; None where the sample lacks it."""
        members = self.locations[number].members
        return next((ext for ext in self.index.modalities[modality].extensions if ext in members), None)

    def _descriptor(self, shard: Path) -> int:
        # pread has no shared position, so that a descriptor opened before a fork serves all workers.
        if shard not in self._files:
            self._files[shard] = os.open(shard, os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def check_shard(path: Path, shard: Shard) -> None:
    """Compare a shard with its entry in the index, its digest too.

    Raises:
        DataError: If it is not the one that was indexed.
    """
    _check_size(path, shard.bytes)
    _group_checked(path, shard)
    if (digest := sha256(path)) != shard.sha256:
        raise _mismatch(path, f"sha256 {digest[:12]}", shard.sha256[:12])


def _group_checked(path: Path, shard: Shard) -> list[tuple[str, dict[str, Member]]]:
    samples = group_members(path)
    if len(samples) != shard.samples:
        raise _mismatch(path, f"{len(samples)} samples", f"{shard.samples}")
    return samples


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise DataError(
            "the index names a shard that is not there", where=path, fix="copy it here, or make the index anew"
        )
    if (actual := path.stat().st_size) != expected:
        raise _mismatch(path, f"{actual} bytes", f"{expected}")


def _mismatch(path: Path, actual: str, expected: str) -> DataError:
    return DataError(
        f"the shard does not match its index: it has {actual}, the index says {expected}",
        where=path,
        fix="make the index anew: mmrep data index",
    )
