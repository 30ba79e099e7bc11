"""What a folder holds that these commands have written, and what is of others."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
from pathlib import Path

from mmrep.data.index import remove_arrays
from mmrep.errors import DataError
from mmrep.files import PART

INDEX, REJECTS = "index.json", "rejects.csv"
SHARD = re.compile(r"[\w-]+-\d{6}\.tar")
"""How shards are named here."""


def same(path: Path, other: Path) -> bool:
    """Whether both are there and have the same bytes."""
    return path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)


def holds_something(folder: Path) -> bool:
    """Whether it is there and not empty."""
    return folder.exists() and any(folder.iterdir())


def indexed(folder: Path) -> list[Path]:
    """The shards that the index.json of an output folder names.

    Raises:
        DataError: If there is none that can be read: what the folder holds may be of others.
    """
    try:
        names = [shard["name"] for shard in json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "the output folder holds something else: it has no readable index.json",
            where=folder,
            fix="give another --out, or remove by hand what is in it",
        ) from error
    return [folder / name for name in names if isinstance(name, str) and SHARD.fullmatch(name)]


def remove_earlier(out: Path) -> None:
    """Remove the shards and arrays of an earlier result; its index.json stays for the new one to replace."""
    for path in (*indexed(out), out / REJECTS):
        path.unlink(missing_ok=True)
    remove_arrays(out)


def remove_build(folder: Path) -> None:
    """Remove what a build left in the folder beside the output."""
    for path in folder.iterdir():
        if path.suffix == PART or SHARD.fullmatch(path.name) or path.name in (INDEX, REJECTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    remove_arrays(folder)
