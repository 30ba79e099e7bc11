"""The folder beside the output where shards are built, and what of it an interrupted run may leave to the next."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrep.data.index import remove_arrays
from mmrep.errors import DataError
from mmrep.files import PART, replacing

WORK = "unfinished"
"""Below the folder: what is not part of the result. It goes before the result is put in place."""
REQUEST = "request.json"
INDEX, REJECTS = "index.json", "rejects.csv"
SHARD = re.compile(r"[\w-]+-\d{6}\.tar")
"""How shards are named here."""
SECONDS_FOR_ORPHANS = 5.0
"""Until the workers of a killed run have noticed and are gone."""


class HopelessError(DataError):
    """What was read can come to nothing, however often it is tried: what was built of it is given up."""


class BuildFolder:
    """``OUT.part``: holds the result until it is whole.

    Args:
        out: The output folder.
        overwrite: Whether shards in it may be replaced, and an interrupted run of something else be given up.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out, self.overwrite = out, overwrite
        self.path = out.with_name(out.name + PART)
        self.work = self.path / WORK

    @contextmanager
    def opened(self, request: dict[str, Any]) -> Iterator[None]:
        """Take the folder, and what is in it if an interrupted run was asked for the very same.

        What is raised inside leaves what is finished to the next run, a HopelessError apart.

        Args:
            request: What decides on the bytes of the result.

        Raises:
            DataError: If it, or the output folder, holds what must not be lost, or another run is using it.
                An output folder without an index.json holds such things.
        """
        if self.out.exists() and (not self.out.is_dir() or (any(self.out.iterdir()) and not self.overwrite)):
            raise DataError(
                "the output folder is not empty",
                where=self.out,
                fix="give another --out, or pass --overwrite to replace shards",
            )
        if self.out.exists() and any(self.out.iterdir()):
            _indexed(self.out)  # refused now rather than after the work
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            self._prepare(json.loads(json.dumps(request)))
            try:
                yield
            except HopelessError:
                self._remove()
                raise

    def publish(self) -> None:
        """Put the whole result in place: by one rename, or file by file beside files of others, the index last.

        Of the output folder only what its index.json names is removed. That file stays until the new one takes its place:
        after a kill in between, the same command goes on.

        Raises:
            DataError: If a file of others has the name of a new shard; what was built is kept.
        """
        if self.out.exists() and any(self.out.iterdir()):
            self._check_names()
        for left in self.path.glob("*.part"):  # of processes that were killed
            left.unlink()
        shutil.rmtree(self.work)
        if not self.out.exists() or not any(self.out.iterdir()):
            self.path.replace(self.out)
            return
        _remove_earlier(self.out)
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == INDEX):
            path.replace(self.out / path.name)
        self.path.rmdir()

    def _check_names(self) -> None:
        """A replacement that was killed half-way leaves new shards, which are like ours."""
        earlier = _indexed(self.out)
        for new in sorted(self.path.glob("*.tar")):
            there = self.out / new.name
            if there.exists() and there not in earlier and not filecmp.cmp(new, there, shallow=False):
                raise DataError(
                    "a file of others has the name of a new shard",
                    where=there,
                    fix="move it away, and run the same again",
                )

    def _remove(self) -> None:
        """Give up what was built; what says that it is ours goes last."""
        _remove_build(self.path)
        shutil.rmtree(self.path, ignore_errors=True)

    def _prepare(self, request: dict[str, Any]) -> None:
        before = _read_request(self.work / REQUEST)
        if before == request:
            return
        if before is not None and not self.overwrite:
            differing = next((name for name in request if before.get(name) != request[name]), "command")
            raise DataError(
                f"an interrupted run was asked for something else (another {differing})",
                where=self.path,
                fix="run it again as it was, or --overwrite to begin anew, or remove the folder",
            )
        ours = before is not None or (self.path / INDEX).is_file()
        if ours:
            _remove_build(self.path)
        shutil.rmtree(self.work, ignore_errors=True)  # last: it says that the rest is ours
        if any(self.path.iterdir()):
            raise DataError("the folder to build in holds files of others", where=self.path, fix="move them away")
        self.work.mkdir()
        with replacing(self.work / REQUEST) as part:
            part.write_text(json.dumps(request), encoding="utf-8")


def _read_request(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out. Forked workers hold the lock too, so that none of a killed run still writes here."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + SECONDS_FOR_ORPHANS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DataError(
                        "another run is building here", where=folder, fix="wait for it, or give another --out"
                    ) from None
                time.sleep(0.1)
        if not folder.exists() or not os.path.samestat(
            folder.stat(), os.fstat(descriptor)
        ):  # the other has put it in place meanwhile
            raise DataError("another run has just ended here", where=folder, fix="look at what it left")
        yield
    finally:
        os.close(descriptor)


def _indexed(folder: Path) -> list[Path]:
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


def _remove_earlier(out: Path) -> None:
    """Remove the shards and arrays of an earlier result; its index.json stays for the new one to replace."""
    for path in (*_indexed(out), out / REJECTS):
        path.unlink(missing_ok=True)
    remove_arrays(out)


def _remove_build(folder: Path) -> None:
    """Remove what a build left in the folder beside the output."""
    for path in folder.iterdir():
        if path.suffix == PART or SHARD.fullmatch(path.name) or path.name in (INDEX, REJECTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    remove_arrays(folder)
