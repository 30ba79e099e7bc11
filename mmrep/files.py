"""Files that are written beside their place and renamed, so that a reader finds the whole file or none."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrep.errors import CheckpointError

PART = ".part"
"""End of the names of what is not finished."""
MOST_TEXT_BYTES = 64 << 20
"""Of a config, or of a tokenizer's file."""


def read_text(path: Path) -> str:
    """A text file of a model's.

    Raises:
        CheckpointError: If it is too large, or no text.
    """
    if path.stat().st_size > MOST_TEXT_BYTES:
        raise CheckpointError(f"larger than {MOST_TEXT_BYTES} bytes", where=path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"broken file ({error})", where=path) from error


def read_json(path: Path) -> Any:
    """A config of a model's.

    Raises:
        CheckpointError: If it is too large, or no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"broken file ({error})", where=path) from error


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder at, which takes the place of ``path`` if all goes well.

    Its name is its own, so that many processes may write the same at once: the last one's stays. A folder that stood there
    is moved away first and then removed.

    Args:
        path: Where it will be; its folder is made.
        sync: Of a file: whether it is on the disk, and so is its name, before anything else happens. After a loss of power
            there is then the old file or the new one, never an empty one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PART}")
    try:
        yield part
        if part.is_dir():
            _replace_folder(part, path)
        else:
            if sync:
                _sync(part)
            part.replace(path)
            if sync:
                _sync(path.parent)
    finally:
        _remove(part)


def set_aside(path: Path) -> None:
    """Give what an earlier start left its own name: ``metrics.csv`` becomes ``metrics.before-resume-N.csv``, which is new.

    Nothing happens where there is nothing.
    """
    name = re.compile(rf"{re.escape(path.stem)}\.before-resume-(\d+){re.escape(path.suffix)}")
    if path.exists():
        earlier = [int(found[1]) for other in path.parent.iterdir() if (found := name.fullmatch(other.name))]
        path.rename(path.with_name(f"{path.stem}.before-resume-{max(earlier, default=0) + 1}{path.suffix}"))


def _replace_folder(part: Path, path: Path) -> None:
    while True:
        old = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PART}")
        try:
            path.rename(old)
        except FileNotFoundError:
            pass
        else:
            _remove(old)
        try:
            part.rename(path)
            return
        except OSError:  # another process has put one there in the meantime
            if not path.exists():
                raise


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
