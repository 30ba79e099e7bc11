"""The folder beside the output where shards are built, and what of it an interrupted run may leave to the next."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.building.contents import INDEX, holds_something, indexed, remove_build, remove_earlier, same
from data_prep.building.lock import locked
from mmrep.errors import DataError
from mmrep.files import PART, replacing

WORK = "unfinished"
"""Below the folder: what is not part of the result. It goes before the result is put in place."""
PUBLISHING = ".publishing"
"""End of the name that the work folder has from when the result is whole until it is in place."""
REQUEST = "request.json"


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
        with locked(self.path):
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
        if self.out.exists() and (not self.out.is_dir() or (holds_something(self.out) and not self.overwrite)):
            raise DataError(
                "the output folder is not empty",
                where=self.out,
                fix="give another --out, or pass --overwrite to replace shards",
            )
        if holds_something(self.out):
            indexed(self.out)  # refused now rather than after the work

    def publish(self) -> None:
        """Put the whole result in place: by one rename, or file by file beside files of others, the index last.

        Of the output folder only what its index.json names is removed. That file stays until the new one takes its place.
        After a kill at any moment the same command goes on, and makes nothing anew.

        Raises:
            DataError: If a file of others has the name of a new shard; what was built is kept.
        """
        for left in self.path.glob("*.part"):  # of processes that were killed
            left.unlink()
        if holds_something(self.out):
            self._check_names()
            remove_earlier(self.out)
        shutil.copyfile(self.path / INDEX, self.work / INDEX)
        self.work.replace(self.publishing)
        self._put_in_place()

    def _put_in_place(self) -> None:
        """The rest of `publish`; nothing of what it did before is done again."""
        if holds_something(self.out):
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
        there = [folder for folder in (self.path, self.out) if same(folder / INDEX, index)]
        if there and before == request:
            self._put_in_place()
            raise InPlaceError("the result is in place; a run that was ended had all but moved it", where=self.out)
        if any(self.path.iterdir()) and not self.overwrite:
            self._refuse(before, request)
        self._check_output()
        remove_build(self.path)
        shutil.rmtree(self.publishing, ignore_errors=True)

    def _check_names(self) -> None:
        """A replacement that was killed half-way leaves new shards, which are like ours."""
        earlier = indexed(self.out)
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
        remove_build(self.path)
        shutil.rmtree(self.path, ignore_errors=True)

    def _prepare(self, request: dict[str, Any]) -> None:
        before = _read_request(self.work / REQUEST)
        if before == request:
            return
        if before is not None and not self.overwrite:
            self._refuse(before, request)
        if before is not None:
            remove_build(self.path)
        shutil.rmtree(self.work, ignore_errors=True)  # last: it says that the rest is ours
        if any(self.path.iterdir()):
            raise DataError("the folder to build in holds files of others", where=self.path, fix="move them away")
        self.work.mkdir()
        with replacing(self.work / REQUEST, sync=True) as part:
            part.write_text(json.dumps(request), encoding="utf-8")


def _read_request(path: Path) -> dict[str, Any] | None:
    """What was asked for; None where that is not there, nothing where it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
