"""The folder beside the output where shards are built, and what of it an interrupted run may leave to the next."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmrep.data.index import remove_arrays
from mmrep.errors import DataError
from mmrep.files import PART, replacing

WORK = "unfinished"
"""Below the folder: what is not part of the result. It goes before the result is put in place."""
PUBLISHING = ".publishing"
"""End of the name that the work folder has from when the result is whole until it is in place."""
REQUEST = "request.json"
INDEX, REJECTS = "index.json", "rejects.csv"
SHARD = re.compile(r"[\w-]+-\d{6}\.tar")
"""How shards are named here."""
SECONDS_FOR_ORPHANS = 5.0
"""Until the workers of a killed run have noticed and are gone."""


class HopelessError(DataError):
    """What was read can come to nothing, however often it is tried: what was built of it is given up."""


class InPlaceError(DataError):
    """Nothing is left to do: a run of the same that was ended had the whole result, which is in place now."""


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
        self.publishing = out.with_name(out.name + PUBLISHING)

    @contextmanager
    def opened(self, request: dict[str, Any]) -> Iterator[None]:
        """Take the folder, and what is in it if an interrupted run was asked for the very same.

        What is raised inside leaves what is finished to the next run, a HopelessError apart.

        Args:
            request: What decides on the bytes of the result.

        Raises:
            DataError: If it, or the output folder, holds what must not be lost, or another run is using it.
                An output folder without an index.json holds such things.
            InPlaceError: If an interrupted run of the very same had only to put its result in place.
        """
        request = json.loads(json.dumps(request))
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            try:
                self._end_publishing(request)
                self._check_output()
                self._prepare(request)
            except DataError:
                with suppress(OSError):  # it is not empty
                    self.path.rmdir()
                raise
            try:
                yield
            except HopelessError:
                self._remove()
                raise

    def _check_output(self) -> None:
        if self.out.exists() and (not self.out.is_dir() or (_holds_something(self.out) and not self.overwrite)):
            raise DataError(
                "the output folder is not empty",
                where=self.out,
                fix="give another --out, or pass --overwrite to replace shards",
            )
        if _holds_something(self.out):
            _indexed(self.out)  # refused now rather than after the work

    def publish(self) -> None:
        """Put the whole result in place: by one rename, or file by file beside files of others, the index last.

        Of the output folder only what its index.json names is removed. That file stays until the new one takes its place.
        After a kill at any moment the same command goes on, and makes nothing anew.

        Raises:
            DataError: If a file of others has the name of a new shard; what was built is kept.
        """
        for left in self.path.glob("*.part"):  # of processes that were killed
            left.unlink()
        if _holds_something(self.out):
            self._check_names()
            _remove_earlier(self.out)
        shutil.copyfile(self.path / INDEX, self.work / INDEX)
        self.work.replace(self.publishing)
        self._put_in_place()

    def _put_in_place(self) -> None:
        """The rest of `publish`; nothing of what it did before is done again."""
        if _holds_something(self.out):
            self._check_names()
            for path in sorted(self.path.iterdir(), key=lambda path: path.name == INDEX):
                path.replace(self.out / path.name)
            self.path.rmdir()
        else:
            self.path.replace(self.out)
        with suppress(FileNotFoundError):  # another run has started meanwhile, and does the same
            for path in self.publishing.iterdir():
                if path.name not in (REQUEST, INDEX):  # they go last: they say whose result is in place
                    path.unlink()
        shutil.rmtree(self.publishing, ignore_errors=True)

    def _end_publishing(self, request: dict[str, Any]) -> None:
        """What a run left that was ended in `publish`."""
        if not self.publishing.exists():
            return
        before, index = _read_request(self.publishing / REQUEST), self.publishing / INDEX
        there = [folder for folder in (self.path, self.out) if _same(folder / INDEX, index)]
        if there and before == request:
            self._put_in_place()
            raise InPlaceError("the result is in place; a run that was ended had all but moved it", where=self.out)
        if self.path in there and not self.overwrite:
            self._refuse(before, request)
        self._check_output()
        _remove_build(self.path)
        shutil.rmtree(self.publishing, ignore_errors=True)

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

    def _refuse(self, before: dict[str, Any] | None, request: dict[str, Any]) -> None:
        differing = next((name for name in request if before and before.get(name) != request[name]), "command")
        raise DataError(
            "an interrupted run was asked for something else "
            f"({f'another {differing}' if before else 'its record is damaged'})",
            where=self.path,
            fix="run it again as it was, or --overwrite to begin anew, or remove the folder",
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
            self._refuse(before, request)
        if before is not None:
            _remove_build(self.path)
        shutil.rmtree(self.work, ignore_errors=True)  # last: it says that the rest is ours
        if any(self.path.iterdir()):
            raise DataError("the folder to build in holds files of others", where=self.path, fix="move them away")
        self.work.mkdir()
        with replacing(self.work / REQUEST, sync=True) as part:
            part.write_text(json.dumps(request), encoding="utf-8")


def _same(path: Path, other: Path) -> bool:
    return path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)


def _holds_something(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _read_request(path: Path) -> dict[str, Any] | None:
    """What was asked for; None where that is not there, nothing where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


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
