"""One pass over a shard: its digest, its samples by WebDataset's convention, and where each member lies."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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


def scan_shards(paths: Sequence[Path], *, workers: int = 1) -> Iterator[ScannedShard]:
    """Scan shards in order, several at a time.

    Args:
        paths: The shards.
        workers: Processes; few bytes are scanned in this one.
    """
    if workers < 2 or len(paths) < 2 or sum(path.stat().st_size for path in paths) < WORTH_A_PROCESS:
        yield from map(scan_shard, paths)
        return
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(min(workers, len(paths)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(scan_shard, paths)


@dataclass(frozen=True)
class KeyedMember:
    """A member of a tar that belongs to a sample: ``key`` and ``extension`` by WebDataset's convention."""

    key: str
    extension: str
    member: Member


def keyed_members(members: Iterable[Member], shard: object) -> Iterator[KeyedMember]:
    """Those members of a tar that belong to samples: a sample's share the name up to the file name's first dot.

    Args:
        members: Of the tar, in order.
        shard: What to name in an error.

    Raises:
        DataError: On a sample whose members do not lie side by side, a repeated extension, or an unsafe format.
    """
    key, keys, found = "", set[str](), set[str]()
    for member in members:
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
        if (its_key := f"{folder}/{stem}" if folder else stem) != key:
            key, found = its_key, set()
            if key in keys:
                raise DataError(
                    f"the members of sample '{key}' do not lie side by side", where=shard, fix="sort them by name"
                )
            keys.add(key)
        if extension in found:
            raise DataError(f"sample '{key}' has two members .{extension}", where=shard)
        found.add(extension)
        yield KeyedMember(key, extension, member)


def group_members(shard: Path) -> list[tuple[str, dict[str, Member]]]:
    """The samples of a shard, in order: ``(key, {extension: member})``.

    Raises:
        DataError: As `keyed_members`.
    """
    samples: list[tuple[str, dict[str, Member]]] = []
    for keyed in keyed_members(walk(shard), shard):
        if not samples or samples[-1][0] != keyed.key:
            samples.append((keyed.key, {}))
        samples[-1][1][keyed.extension] = keyed.member
    return samples


def is_decodable(extension: str) -> bool:
    """Whether any decoder takes members with this extension; others are passed over.

    So are those with a +, of `notes.c++.txt` say: it stands between the extensions of a `Shard.presence`.
    """
    return "+" not in extension and extension.rsplit(".", 1)[-1] in DECODABLE


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
