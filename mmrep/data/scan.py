"""One pass over a shard: its digest, its samples by WebDataset's convention, and where each member lies."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

from mmrep.data.decode import KINDS
from mmrep.data.member_table import MemberTable
from mmrep.data.tar import Member, walk
from mmrep.errors import DataError

UNSAFE_EXTENSIONS = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "npz", "gz", "bin"})
"""Formats that other readers unpickle or unpack without a bound: a shard with them is refused."""

MAX_MEMBER_BYTES = (1 << 32) - 1
CHUNK = 1 << 20
WORTH_A_PROCESS = 64 << 20
"""Bytes of shards from which on starting processes costs less than it saves."""

DECODABLE = frozenset({"json", *(extension for extensions in KINDS.values() for extension in extensions)})


@dataclass(frozen=True)
class ScannedShard:
    """What one pass over a shard found.

    Attributes:
        bytes, sha256: Of the file.
        samples: Keys, and per extension offset, size and CRC-32.
    """

    bytes: int
    sha256: str
    samples: list[tuple[str, dict[str, tuple[int, int, int]]]]

    def extension_sets(self) -> dict[str, int]:
        """How many samples have which set of extensions that can be decoded: ``{"jpg+txt": 9}``."""
        found = Counter("+".join(sorted(e for e in members if is_decodable(e))) for _, members in self.samples)
        return dict(sorted(found.items()))

    def table(self, extensions: Sequence[str]) -> MemberTable:
        """The samples as rows."""
        return MemberTable.build(self.samples, extensions)


def scan_shard(path: Path) -> ScannedShard:
    """Read a whole shard once, from its headers to its checksums.

    Raises:
        DataError: If it is damaged, or holds what is refused.
    """
    with path.open("rb") as file:
        samples = [
            (key, {extension: (m.offset, m.size, _crc32(file, m)) for extension, m in members.items()})
            for key, members in group_members(path)
        ]
        return ScannedShard(path.stat().st_size, sha256(path), samples)


def scan_shards(
    paths: Sequence[Path], *, workers: int = 1, done: Callable[[int], None] = lambda size: None
) -> Iterator[ScannedShard]:
    """Scan shards in order, several at a time.

    Args:
        paths: The shards.
        workers: Processes; few bytes are scanned in this one.
        done: Called with the bytes of each shard that has been scanned.
    """
    sizes = [path.stat().st_size for path in paths]
    if workers < 2 or len(paths) < 2 or sum(sizes) < WORTH_A_PROCESS:
        yield from _counted(map(scan_shard, paths), done)
        return
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(min(workers, len(paths)), mp_context=get_context("spawn")) as pool:
        yield from _counted(pool.map(scan_shard, paths), done)


def _counted(shards: Iterable[ScannedShard], done: Callable[[int], None]) -> Iterator[ScannedShard]:
    for shard in shards:
        done(shard.bytes)
        yield shard


def group_members(shard: Path) -> list[tuple[str, dict[str, Member]]]:
    """The samples of a shard, in order: ``(key, {extension: member})``, by WebDataset's convention.

    A sample's members lie side by side and share the name up to the first dot of the file name.

    Raises:
        DataError: On a key that appears in two places, a repeated extension, or an unsafe format.
    """
    samples: list[tuple[str, dict[str, Member]]] = []
    keys: set[str] = set()
    for member in walk(shard):
        folder, _, file = member.name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not dot or not stem:
            continue  # WebDataset reads no sample from a name without an extension, a README say
        extension = extension.lower()
        if extension.rsplit(".", 1)[-1] in UNSAFE_EXTENSIONS or extension.startswith("__"):
            raise DataError(
                f"'{member.name}' is of an unsafe format", where=shard, fix="store png, jpg, txt, flac, npy or json"
            )
        if member.size > MAX_MEMBER_BYTES:
            raise DataError(f"'{member.name}' has {member.size} bytes, more than {MAX_MEMBER_BYTES}", where=shard)
        key = f"{folder}/{stem}" if folder else stem
        if not samples or samples[-1][0] != key:
            if key in keys:
                raise DataError(
                    f"the members of sample '{key}' do not lie side by side", where=shard, fix="sort them by name"
                )
            keys.add(key)
            samples.append((key, {}))
        if extension in samples[-1][1]:
            raise DataError(f"sample '{key}' has two members .{extension}", where=shard)
        samples[-1][1][extension] = member
    return samples


def is_decodable(extension: str) -> bool:
    """Whether any decoder takes members with this extension; others are passed over."""
    return extension.rsplit(".", 1)[-1] in DECODABLE


def sha256(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(file: BinaryIO, member: Member) -> int:
    file.seek(member.offset)
    checksum, left = 0, member.size
    while left and (data := file.read(min(left, CHUNK))):
        checksum, left = zlib.crc32(data, checksum), left - len(data)
    return checksum
