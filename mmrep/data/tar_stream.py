"""A strict reader of a shard whose bytes come once and forward: samples by WebDataset's grouping, verified to the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from webdataset.tariterators import group_by_keys

from mmrep.data.decode import MAX_BYTES
from mmrep.data.index import kind_of
from mmrep.data.locations import is_url
from mmrep.data.scan import keyed_members
from mmrep.data.shard_cache import CHUNK, open_url, retried
from mmrep.data.tar import Member, walk
from mmrep.errors import DataError, SampleError

MOST = max(MAX_BYTES.values())
"""Bytes that any member may have, also one that is passed over."""
MOST_BETWEEN = 16 << 20
"""Bytes from a member's end to the next one, or to the end of the shard: tar pads with zeros to its record size."""


def read_shard(place: str, name: str, extensions: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The samples of one shard: ``__key__``, ``__url__`` (its name), and the members with some extensions as bytes.

    Shards are grouped one by one, so that the cut tail of one is never completed by the head of the next. In place of a
    member that is larger than its kind may be stands a `SampleError`.

    Args:
        place: File or URL.
        name: Of the shard, for messages about its samples.
        extensions: What to read; other members are passed over.

    Raises:
        DataError: If the shard cannot be opened, breaks off, is damaged, or holds what is refused. Opening it is tried again,
            reading on is not: it would repeat samples.
    """
    with retried(lambda: open_url(place) if is_url(place) else Path(place).open("rb"), place) as raw:
        yield from group_by_keys(_members(_Forward(raw, place), name, extensions), suffixes=extensions)


def _members(shard: _Forward, name: str, extensions: frozenset[str]) -> Iterator[dict[str, Any]]:
    """The members of a shard as webdataset's `group_by_keys` takes them; it ends only where the shard does.

    In place of webdataset's ``tar_file_expander``, which has no hook between a member's header and the reading of as many
    bytes as that declares, and takes a damaged header or a cut for the end of the shard.
    """
    for keyed in keyed_members(_bounded(shard), shard):
        wanted = keyed.extension in extensions
        data = _payload(shard, keyed.member.offset, keyed.member.size, keyed.extension) if wanted else None
        yield {"fname": keyed.member.name, "data": data, "__url__": name}


def _bounded(shard: _Forward) -> Iterator[Member]:
    """The members of a shard, also those that are passed over; each says how much more may come."""
    for member in walk(shard):
        if member.size > MOST:
            raise DataError(f"'{member.name}' declares {member.size} bytes, more than {MOST}", where=shard)
        shard.most = member.offset + member.size + MOST_BETWEEN
        yield member


def _payload(shard: _Forward, offset: int, size: int, extension: str) -> bytes | SampleError:
    most = MAX_BYTES[kind_of(extension)]
    if size > most:
        return SampleError(f"member .{extension} has {size} bytes, more than {most}", reason="too large")
    shard.seek(offset)
    data = shard.read(size)
    if len(data) < size:
        raise DataError("the tar ends in the middle of a member", where=shard, fix="copy or write the shard again")
    return data


class _Forward:
    """A stream that `walk` can read: what was asked for last can be asked for again, and nothing before it.

    Attributes:
        most: Bytes up to which may be read: nothing makes the reader go on and on.
    """

    def __init__(self, raw: Any, place: str) -> None:
        self.raw, self.place, self.most = raw, place, MOST_BETWEEN
        self.buffer, self.start, self.position = bytearray(), 0, 0

    def __str__(self) -> str:
        return self.place

    def open(self, mode: Literal["rb"]) -> _Forward:
        return self

    def __enter__(self) -> _Forward:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to an offset; of the end nothing is known."""
        if whence:
            return sys.maxsize
        self.position = offset
        return offset

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only at the end. No more is allocated than has come."""
        while (have := self.start + len(self.buffer)) < self.position + size:
            if have > self.most:
                raise DataError(f"the tar goes on and on without a member after byte {self.most}", where=self)
            passed = min(self.position - self.start, len(self.buffer))
            del self.buffer[:passed]
            self.start += passed
            if not (data := self._more()):
                break
            self.buffer += data
        at = self.position - self.start
        data = bytes(self.buffer[at : at + size])
        self.position += len(data)
        return data

    def _more(self) -> bytes:
        try:
            data: bytes = self.raw.read(CHUNK)
            return data
        except Exception as error:
            raise DataError(
                f"the shard broke off after {self.start + len(self.buffer)} bytes ({type(error).__name__}: {error})",
                where=self.place,
                fix="check network and disk, and go on from the last checkpoint",
            ) from error
