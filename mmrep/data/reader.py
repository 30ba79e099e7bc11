"""`Samples`: the bytes of a split's samples, by number, whole batches at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from mmrep.data.decode import MAX_BYTES
from mmrep.data.index import Index, Shard, kind_of
from mmrep.data.member_table import MemberTable
from mmrep.data.order import Contents
from mmrep.data.scan import scan_shard
from mmrep.data.shard_cache import ShardCache
from mmrep.data.shard_files import ShardFiles, mismatch
from mmrep.errors import DataError, SampleError

Stored = tuple[str, bytes] | SampleError | None
"""One member as it was read: its extension and its bytes, what is wrong with it, or None where the sample lacks it."""

GAP = 16 << 10
"""Bytes between two members up to which one read for both is cheaper than two."""
MAX_READ = 32 << 20
"""Bytes after which another read begins, so that no read is larger than this and one member."""

BEYOND = np.uint64(1 << 62)
"""An offset past the end of any shard, so that sums of what a broken index claims do not overflow."""
PLACE = np.dtype([(name, "<i8") for name in ("shard", "offset", "size", "crc32", "sample", "item", "column")])
"""One member to read: where it lies, and which entry of the result it fills."""


class Samples:
    """The samples of a split in shard order, each readable by its number.

    The shards' sizes are checked against the index when this is made, so that a wrong folder fails before the first step
    and not in the middle of an epoch; remote shards are checked when they are fetched.

    Args:
        index: Of the shards.
        split: Which.
        cache: Where remote shards are kept.

    Raises:
        DataError: If a shard is missing, or is not the one that was indexed.
    """

    def __init__(self, index: Index, split: str, cache: ShardCache | None = None) -> None:
        self.index = index
        self.shards = index.split(split)
        self.files = ShardFiles(index.root, self.shards, cache)
        first_rows = dict(
            zip((s.name for s in index.shards), np.cumsum([0, *(s.samples for s in index.shards)]), strict=False)
        )
        self._rows = np.array([first_rows[shard.name] for shard in self.shards], dtype=np.int64)
        self._starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self._caps = np.array([MAX_BYTES[_kind(extension)] for extension in index.extensions], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.index.table.key(int(self._row(np.array([number]))[0]))

    def where(self, number: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.shard(number).name}:{self.key(number)}"

    def shard(self, number: int) -> Shard:
        """The shard that holds a sample."""
        return self.shards[int(np.searchsorted(self._starts, number, side="right")) - 1]

    def has(self, number: int, extension: str) -> bool:
        """Whether a sample has a member with an extension."""
        if extension not in self.index.extensions:
            return False
        mask = int(self.index.table.present[self._row(np.array([number]))[0]])
        return bool(mask >> self.index.extensions.index(extension) & 1)

    def extension_of(self, number: int, modality: str) -> str | None:
        """The extension that carries ``modality`` in sample ``number``; None where the sample lacks it."""
        return next((ext for ext in self.index.modalities[modality].extensions if self.has(number, ext)), None)

    def read(self, number: int, extension: str) -> bytes:
        """The bytes of one member of a sample.

        Raises:
            DataError: If there is none, or it cannot be read.
            SampleError: If it is damaged.
        """
        if not self.has(number, extension):
            raise DataError(f"no member .{extension}", where=self.where(number))
        found = self.read_many(np.array([number]), [[self.index.extensions.index(extension)]])[0][0]
        if isinstance(found, SampleError):
            raise found
        assert found is not None, "presence was asked for above"
        return found[1]

    def columns(self, modality: str) -> list[int]:
        """Columns of the table that may carry a modality, the preferred first."""
        extensions = self.index.extensions
        return [extensions.index(ext) for ext in self.index.modalities[modality].extensions if ext in extensions]

    def read_many(self, numbers: np.ndarray, wanted: Sequence[Sequence[int]]) -> list[list[Stored]]:
        """Members of many samples, in as few reads as their places allow, checksums verified.

        Args:
            numbers: ``[n]``.
            wanted: What to read of each sample: for each item the columns that may carry it, the preferred first.

        Returns:
            For each sample, in the order of ``numbers``, one entry for each item of ``wanted``.

        Raises:
            DataError: If a disk or network fails for good.
        """
        rows = self._row(numbers)
        present, members = self.index.table.present[rows].astype(np.uint64), self.index.table.members[rows]
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        result: list[list[Stored]] = [[None] * len(wanted) for _ in range(len(numbers))]
        found = []
        for item, columns in enumerate(wanted):
            column = _first_present(present, columns)
            (has,) = np.nonzero(column >= 0)
            stored = members[has, column[has]]
            too_large = stored["size"] > self._caps[column[has]]
            for sample in has[too_large].tolist():
                size = int(members[sample, column[sample]]["size"])
                result[sample][item] = self._too_large(
                    int(numbers[sample]), self.index.extensions[column[sample]], size
                )
            place = np.zeros(len(has), dtype=PLACE)
            place["shard"], place["sample"], place["item"], place["column"] = shards[has], has, item, column[has]
            place["offset"] = np.minimum(stored["offset"], BEYOND)
            place["size"], place["crc32"] = stored["size"], stored["crc32"]
            found.append(place[~too_large])
        places = np.concatenate(found) if found else np.zeros(0, dtype=PLACE)
        if len(places):
            self._read_sorted(places[np.lexsort((places["offset"], places["shard"]))], numbers, result)
        return result

    def _read_sorted(self, places: np.ndarray, numbers: np.ndarray, result: list[list[Stored]]) -> None:
        """Read places that are sorted by shard and offset; neighbours come with one read."""
        extensions, firsts = self.index.extensions, _starts_of_reads(places)
        starts, counts = places["offset"][firsts], np.diff(firsts, append=len(places))
        lengths = np.maximum.reduceat(places["offset"] + places["size"], firsts) - starts
        reads = zip(*(column.tolist() for column in (places["shard"][firsts], starts, lengths, counts)), strict=True)
        places["offset"] -= np.repeat(starts, counts)
        fields = ("offset", "size", "crc32", "sample", "item", "column")
        members = zip(*(places[name].tolist() for name in fields), strict=True)
        for shard, start, length, count in reads:
            data = self.files.read(shard, start, length)
            for begin, size, checksum, sample, item, column in islice(members, count):
                member = data[begin : begin + size]
                intact = zlib.crc32(member) == checksum
                if not intact and self.files.refetch_if_damaged(shard):
                    data = self.files.read(shard, start, length)
                    member = data[begin : begin + size]
                    intact = zlib.crc32(member) == checksum
                if intact:
                    result[sample][item] = (extensions[column], member)
                else:
                    result[sample][item] = self._differs(int(numbers[sample]), extensions[column])

    def contents(self, modalities: Sequence[str]) -> Contents:
        """What a plan must know of the split, modality sets counted over some modalities."""
        columns = [
            sum(1 << column for column in self.columns(name)) for name in modalities if name in self.index.modalities
        ]
        positions = [position for position, name in enumerate(modalities) if name in self.index.modalities]
        sets = ModalitySets(self, columns, positions)
        found = [sets.histogram(shard) for shard in self.shards]
        known = sorted({modality_set for histogram in found for modality_set in histogram} or {0})
        counts = np.array([[histogram.get(s, 0) for s in known] for histogram in found], dtype=np.int64)
        return Contents(counts.reshape(len(found), len(known)), tuple(known), sets)

    def rows(self) -> list[tuple[int, Shard]]:
        """The shards, each with the row of its first sample in the index's table."""
        return list(zip(self._rows.tolist(), self.shards, strict=True))

    def masks(self, shard: int) -> np.ndarray:
        """Which extensions the samples of a shard have, a bit each."""
        first = int(self._rows[shard])
        masks: np.ndarray = self.index.table.present[first : first + self.shards[shard].samples]
        return masks

    def _row(self, numbers: np.ndarray) -> np.ndarray:
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        rows: np.ndarray = self._rows[shards] + numbers - self._starts[shards]
        return rows

    def _differs(self, number: int, extension: str) -> SampleError:
        return SampleError(
            f"member .{extension} is not what was indexed: its checksum differs",
            where=self.where(number),
            fix="copy or write the shard again",
            reason="checksum",
        )

    def _too_large(self, number: int, extension: str, size: int) -> SampleError:
        most = MAX_BYTES[_kind(extension)]
        return SampleError(
            f"member .{extension} has {size} bytes, more than {most}", where=self.where(number), reason="too large"
        )


@dataclass(frozen=True)
class Where:
    """Shard and key of a sample, looked up only when a message needs them."""

    samples: Samples
    number: int

    def __str__(self) -> str:
        return self.samples.where(self.number)


class ModalitySets:
    """Which modalities the samples of a shard have: a function that can be sent to another process.

    Args:
        samples: Of the split.
        columns: For each modality a mask of the extensions that may carry it.
        positions: The bit of each modality.
    """

    def __init__(self, samples: Samples, columns: Sequence[int], positions: Sequence[int]) -> None:
        self.samples, self.columns, self.positions = samples, columns, positions

    def __call__(self, shard: int) -> np.ndarray:
        masks = self.samples.masks(shard).astype(np.uint64)
        sets = np.zeros(len(masks), dtype=np.int64)
        for columns, position in zip(self.columns, self.positions, strict=True):
            sets |= ((masks & np.uint64(columns)) != 0).astype(np.int64) << position
        return sets

    def histogram(self, shard: Shard) -> dict[int, int]:
        """The same of a whole shard, from the index alone."""
        counts: dict[int, int] = {}
        for extensions, count in shard.presence.items():
            mask = sum(1 << self.samples.index.extensions.index(ext) for ext in extensions.split("+") if ext)
            modality_set = sum(
                1 << position for columns, position in zip(self.columns, self.positions, strict=True) if mask & columns
            )
            counts[modality_set] = counts.get(modality_set, 0) + count
        return counts


def check_shards(index: Index, cache: ShardCache | None = None) -> Iterator[tuple[Shard, str | None]]:
    """Compare each shard with its entry in the index: size, digest, structure, and place and checksum of each member.

    Yields:
        A shard, and what is wrong with it; None where it is the one that was indexed.
    """
    row = 0
    for shard in index.shards:
        try:
            _check_shard(index, shard, row, cache)
            yield shard, None
        except (DataError, OSError) as error:
            yield shard, str(error)
        row += shard.samples


def _check_shard(index: Index, shard: Shard, first: int, cache: ShardCache | None) -> None:
    files = ShardFiles(index.root, [shard], cache)
    files.refetch_if_damaged(0)
    path = files.local_path(0)
    scanned = scan_shard(path)
    if scanned.sha256 != shard.sha256:
        raise mismatch(path, f"sha256 {scanned.sha256[:12]}", shard.sha256[:12])
    excluded = set(index.excluded)
    kept = [sample for sample in scanned.samples if f"{shard.name}:{sample[0]}" not in excluded]
    expected, table = MemberTable.build(kept, index.extensions), index.table
    if len(expected) != shard.samples or not np.array_equal(
        expected.members, table.members[first : first + shard.samples]
    ):
        raise mismatch(path, f"members of {len(expected)} samples", "others")
    if any(expected.key(row) != table.key(first + row) for row in range(shard.samples)):
        raise mismatch(path, "keys", "others")


def _starts_of_reads(places: np.ndarray) -> np.ndarray:
    """The first places of the reads: where the shard changes, or the gap is not worth reading, or the last read is large."""
    shard, offset = places["shard"], places["offset"]
    far = offset[1:] - (offset + places["size"])[:-1] > GAP
    new = far | (shard[1:] != shard[:-1]) | (offset[1:] // MAX_READ != offset[:-1] // MAX_READ)
    firsts: np.ndarray = np.concatenate([[0], np.flatnonzero(new) + 1])
    return firsts


def _first_present(present: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """For each mask the first of some columns that it has; -1 for none."""
    chosen = np.full(len(present), -1)
    for column in reversed(columns):
        chosen[(present >> np.uint64(column) & np.uint64(1)).astype(bool)] = column
    return chosen


def _kind(extension: str) -> str:
    return "json" if extension.rsplit(".", 1)[-1] == "json" else kind_of(extension)
