"""A strict walk over the headers of a tar file: where each member lies, with every claim checked before it is believed.

Python's tarfile stops without a word at a damaged header and believes any declared size; either would pair one sample's
picture with another's caption, or keep a worker spinning. Here damage is a `DataError` that names shard and offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mmrep.errors import DataError

BLOCK = 512
MAX_EXTENDED_HEADER = 64 * 1024
"""Bytes that a pax or long-name header may take: names and sizes need a few hundred."""


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file inside a tar: its payload is ``size`` bytes at ``offset`` of the tar."""

    name: str
    offset: int
    size: int


class Openable(Protocol):
    """What can be walked beside a file: something that opens as one and is named by its ``str``."""

    def open(self, mode: Literal["rb"]) -> AbstractContextManager[Readable]: ...


class Readable(Protocol):
    """What `walk` asks of an open tar: it seeks to the end once, then only forward."""

    def seek(self, offset: int, whence: int = 0, /) -> int: ...

    def read(self, size: int, /) -> bytes: ...


def walk(path: Path | Openable) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar, in order.

    Understands ustar, GNU long names, and pax ``path`` and ``size``. Directories are passed over.

    Raises:
        DataError: On a wrong checksum, a member that reaches past the end, a name that would leave its folder, a link or
            device, or a tar without its two closing blocks.
    """
    with path.open("rb") as file:
        total = file.seek(0, 2)
        position, long_name, pax = 0, None, dict[str, str]()
        while not _is_end(header := _read(file, position, BLOCK, path), file, position, path):
            kind, size = header[156:157], _size(header, pax, position, path)
            payload = position + BLOCK
            if payload + size > total:
                raise DataError(
                    f"the tar declares a member of {size} bytes at offset {position}, past its end", where=path
                )
            if kind in b"xL" and size > MAX_EXTENDED_HEADER:
                raise DataError(f"the tar has an extended header of {size} bytes at offset {position}", where=path)
            if kind == b"x":
                pax = _parse_pax(_read(file, payload, size, path), position, path)
            elif kind == b"L":
                long_name = _read(file, payload, size, path).rstrip(b"\0").decode(errors="replace")
            else:
                if kind in b"0\0":
                    yield Member(_safe_name(pax.get("path") or long_name or _ustar_name(header), path), payload, size)
                elif kind not in b"5g":
                    raise DataError(
                        f"the tar holds a link or device at offset {position}", where=path, fix="pack plain files"
                    )
                long_name, pax = None, {}
            position = payload + -(-size // BLOCK) * BLOCK


def _read(file: Readable, position: int, size: int, path: object) -> bytes:
    file.seek(position)
    data = file.read(size)
    if len(data) < size:
        raise DataError(f"the tar ends in the middle of a block at offset {position}", where=path, fix=_REWRITE)
    return data


_REWRITE = "copy or write the shard again"


def _is_end(header: bytes, file: Readable, position: int, path: object) -> bool:
    """Whether the two closing blocks of zeros begin here; anything after them must be zeros too."""
    if any(header):
        return False
    _read(file, position, 2 * BLOCK, path)
    file.seek(position)
    while rest := file.read(1 << 20):
        if any(rest):
            raise DataError(f"the tar goes on after its closing blocks at offset {position}", where=path, fix=_REWRITE)
    return True


def _size(header: bytes, pax: dict[str, str], position: int, path: object) -> int:
    """The member's size, once the header's checksum has been verified."""
    stored = _octal(header[148:156], position, path)
    if stored != sum(header[:148]) + 8 * 32 + sum(header[156:]):
        raise DataError(f"the tar has a damaged header at offset {position}", where=path, fix=_REWRITE)
    if header[156:157] != b"x" and "size" in pax:
        if not re.fullmatch(r"\d{1,18}", pax["size"]):
            raise DataError(f"the tar has an impossible size at offset {position}", where=path, fix=_REWRITE)
        return int(pax["size"])
    field = header[124:136]
    if field[0] == 0x80:  # GNU's base-256 form, for members of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    return _octal(field, position, path)


def _octal(field: bytes, position: int, path: object) -> int:
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise DataError(f"the tar has a damaged header at offset {position}", where=path, fix=_REWRITE)
    return int(text or b"0", 8)


def _parse_pax(data: bytes, position: int, path: object) -> dict[str, str]:
    """Records of the form ``length key=value\\n``, where length counts the whole record."""
    records: dict[str, str] = {}
    at = 0
    while at < len(data):
        match = re.compile(rb"(\d{1,9}) ([^=]+)=").match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            raise DataError(f"the tar has a damaged pax header at offset {position}", where=path, fix=_REWRITE)
        records[match[2].decode(errors="replace")] = data[match.end() : end - 1].decode(errors="replace")
        at = end
    return records


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" and header[262:263] == b"\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _safe_name(name: str, path: object) -> str:
    name = name.removeprefix("./")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "" in parts or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise DataError(
            f"the tar holds a member with an unsafe name, {name!r}", where=path, fix="pack relative, plain names"
        )
    return name
