"""`MemberTable`: where every member of every sample lies, in memory-mapped arrays that all workers share.

Sixteen bytes for each sample and extension, and the keys. NumPy's own file format, read without pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmrep.data.writer import write_npy
from mmrep.errors import DataError

MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
"""Where the bytes of one member lie in its shard, and their checksum."""

FILES = ("members.npy", "present.npy", "keys.npy", "key_ends.npy")
MAX_EXTENSIONS = 64
AGAIN = "make it anew: mmrep data index"


@dataclass(frozen=True)
class MemberTable:
    """The samples of all shards of an index, a row each, in the order of the shards.

    Attributes:
        extensions: E member extensions, the columns.
        members: `MEMBER` ``[N, E]``; zeros where a sample lacks one.
        present: Unsigned ``[N]``: bit e says that the sample has ``extensions[e]``.
        keys: uint8: all keys in UTF-8, one after another.
        key_ends: uint64 ``[N]``: where each key ends.
        folder: Where the arrays were loaded from.
    """

    extensions: tuple[str, ...]
    members: np.ndarray
    present: np.ndarray
    keys: np.ndarray
    key_ends: np.ndarray
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.present)

    def key(self, row: int) -> str:
        """The key of the sample in a row.

        Raises:
            DataError: If the arrays hold none there; to look at all keys when they are loaded would take too long.
        """
        start, end = int(self.key_ends[row - 1]) if row else 0, int(self.key_ends[row])
        try:
            if not start <= end <= len(self.keys):
                raise ValueError(f"it lies from byte {start} to {end}")
            return self.keys[start:end].tobytes().decode()
        except ValueError as error:
            raise DataError(f"broken index (key {row}: {error})", where=self.folder, fix=AGAIN) from error

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:  # a worker maps the files again instead of receiving a copy of them
            return MemberTable.load, (self.folder, self.extensions)
        values = (self.extensions, self.members, self.present, self.keys, self.key_ends)
        return MemberTable, values

    def save(self, folder: Path) -> None:
        """Write the arrays into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            write_npy(folder / name, getattr(self, name.removesuffix(".npy")))

    @classmethod
    def load(cls, folder: Path, extensions: Sequence[str]) -> MemberTable:
        """Map the arrays of a folder.

        Raises:
            DataError: If one is missing, or not of the shape that the others ask for.
        """
        try:
            arrays = {
                name.removesuffix(".npy"): np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in FILES
            }
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"broken index ({error})", where=folder, fix=AGAIN) from error
        table = cls(tuple(extensions), **arrays, folder=folder)
        rows = len(table.present)
        whole = (
            table.members.dtype == MEMBER
            and table.members.shape == (rows, len(table.extensions))
            and table.present.dtype.kind == table.key_ends.dtype.kind == "u"
            and table.present.shape == table.key_ends.shape == (rows,)
            and table.keys.dtype == np.uint8
            and table.keys.ndim == 1
            and (not rows or int(table.key_ends[-1]) == len(table.keys))
        )
        if not whole:
            raise DataError("the arrays of the index do not fit together", where=folder, fix=AGAIN)
        return table

    @classmethod
    def build(
        cls, samples: Sequence[tuple[str, Mapping[str, tuple[int, int, int]]]], extensions: Sequence[str]
    ) -> MemberTable:
        """The table of samples in memory.

        Args:
            samples: Keys, and per extension offset, size and CRC-32 of the member.
            extensions: Which of them to keep.
        """
        columns = {extension: column for column, extension in enumerate(extensions)}
        members = np.zeros((len(samples), len(columns)), dtype=MEMBER)
        present = np.zeros(len(samples), dtype=_mask_type(len(columns)))
        for row, (_, found) in enumerate(samples):
            for extension, member in found.items():
                if (column := columns.get(extension)) is not None:
                    members[row, column] = member
                    present[row] |= present.dtype.type(1 << column)
        keys = [key.encode() for key, _ in samples]
        ends = np.cumsum([len(key) for key in keys], dtype=np.uint64)
        return cls(tuple(extensions), members, present, np.frombuffer(b"".join(keys), dtype=np.uint8), ends)

    @classmethod
    def concatenate(cls, tables: Sequence[MemberTable]) -> MemberTable:
        """Tables of the same extensions, one after another."""
        shifts = np.cumsum([0, *(len(table.keys) for table in tables)]).astype(np.uint64)
        first = tables[0]
        return cls(
            first.extensions,
            np.concatenate([table.members for table in tables]),
            np.concatenate([table.present for table in tables]),
            np.concatenate([table.keys for table in tables]),
            np.concatenate([table.key_ends + shift for table, shift in zip(tables, shifts, strict=False)]),
        )


def _mask_type(bits: int) -> np.dtype[Any]:
    """The smallest unsigned type with so many bits."""
    if bits > MAX_EXTENSIONS:
        raise DataError(f"the shards hold {bits} kinds of members, more than {MAX_EXTENSIONS}")
    return np.dtype(next(f"<u{size}" for size in (1, 2, 4, 8) if bits <= 8 * size))
