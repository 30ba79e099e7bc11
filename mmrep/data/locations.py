"""Where shards are: a folder, a pattern of files, or a URL of one of a few schemes. Nothing here starts a program."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmrep.errors import DataError

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""What may stand before ``://``. ``pipe:`` never may: it would run a command."""

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def is_url(place: str) -> bool:
    """Whether a place is a URL of a scheme that mmrep reads.

    Raises:
        DataError: If it has another scheme.
    """
    match = SCHEME.match(place)
    if match is None:
        return False
    if match[1] not in SCHEMES or not place[match.end() :].startswith("//"):
        raise DataError(
            f"'{match[1]}:' is no place to read shards from",
            where=place,
            fix=f"use a folder, or {', '.join(SCHEMES)} ://",
        )
    return True


def join(root: str, name: str) -> str:
    """A name below a folder or URL."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


@dataclass(frozen=True)
class ShardList:
    """Shards below one folder or URL.

    Attributes:
        root: The folder or URL.
        names: Of the shards, relative to it, sorted.
    """

    root: str
    names: tuple[str, ...]


def find_shards(place: str) -> ShardList:
    """The shards of a folder (``*.tar`` at any depth) or of a pattern with ``*``, ``?`` or ``{000..099}``.

    Raises:
        DataError: If there are none, or a URL asks for a listing.
    """
    if is_url(place):
        return _find_remote(place)
    if Path(place).is_dir():
        names = sorted(path.relative_to(place).as_posix() for path in Path(place).rglob("*.tar"))
        return _found(place, place, names)
    patterns = expand_braces(place)
    found = (glob.glob(pattern, recursive=True) for pattern in patterns)  # noqa: PTH207 - a pattern may be absolute
    files = sorted({file for names in found for file in names})
    missing = [name for name in patterns if not glob.has_magic(name) and not Path(name).is_file()]
    if files and missing:
        raise DataError(f"no shard {missing[0]}", where=place, fix="name only those that are there, or use *")
    folders = {str(Path(file).parent) for file in files}
    root = folders.pop() if len(folders) == 1 else _common([*folders])
    return _found(place, root, [PurePosixPath(file).relative_to(root).as_posix() for file in files])


def expand_braces(pattern: str) -> list[str]:
    """``a{00..02}`` to ``a00``, ``a01``, ``a02``."""
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"broken pattern ({error})", where=pattern, fix="write {000..099}") from error


def _find_remote(place: str) -> ShardList:
    urls = expand_braces(place)
    if not place.endswith(".tar") or any(character in place for character in "*?"):
        raise DataError(
            "shards at a URL are not listed", where=place, fix="name them: https://host/train-{000..099}.tar"
        )
    root = _common([url.rpartition("/")[0] for url in urls])
    return _found(place, root, [url.removeprefix(root).lstrip("/") for url in urls])


def _found(place: str, root: str, names: list[str]) -> ShardList:
    if not names:
        raise DataError("no shards (*.tar)", where=place, fix="give the folder that holds them, or a pattern")
    return ShardList(root, tuple(sorted(names)))


def _common(folders: list[str]) -> str:
    if not folders:
        return "."
    parts = [folder.split("/") for folder in folders]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "/".join(shared) or ("/" if folders[0].startswith("/") else ".")
