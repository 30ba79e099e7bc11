"""Entries of a published data set -> shards and their index: what the readers of the field's layouts share.

An entry is what the release counts: a picture with its captions, a row, a segment. Shard n of a split is made of the entries
from n * S to (n + 1) * S and of nothing else, so the number of processes changes no byte. Everything is built in ``OUT.part``,
where a run that ended goes on (see `data_prep.building`), and put in place whole. An entry that cannot be used is listed in
rejects.csv and ends nothing.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.building.read_file import is_passing
from mmrep.errors import DataError

if TYPE_CHECKING:
    from data_prep.building.build_folder import BuildFolder
    from data_prep.building.finished_shards import FinishedShards

Members = Mapping[str, Any]
"""Extension -> content of a sample, as `mmrep.data.writer.write_shard` takes it, without the key."""


@dataclass(frozen=True)
class Release:
    """A data set as it was released, ready to be written.

    Attributes:
        name: Of the data set.
        splits: Split -> its entries, each cheap to name; what is large is read by ``make``.
        files: All that is read. A run does not go on with what another left of files that have changed since.
        make: From the split and an entry to its samples; raises DataError or OSError where the entry cannot be used. An
            OSError of a file system that is away for a while ends the run.
        modalities: Modality -> ``(extensions, kind)``; one that no sample has is left out of the index.
        group_key: Field of the samples' JSON: samples with equal values are right answers to each other.
        labels: Field of the samples' JSON -> its classes.
        provenance: What it was made from.
        licences: Of its parts.
    """

    name: str
    splits: Mapping[str, Sequence[Any]]
    files: Sequence[Path]
    make: Callable[[str, Any], Sequence[Members]]
    modalities: Mapping[str, tuple[tuple[str, ...], str]]
    group_key: str | None = None
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)


class Reject(NamedTuple):
    """Why an entry is left out: its split, its number there from 0, the file or row at fault, and what is wrong."""

    split: str
    entry: int
    where: str
    reason: str


class Task(NamedTuple):
    """A shard to be: its name, its split, and which entries go in."""

    name: str
    split: str
    start: int
    stop: int


@dataclass
class Done:
    """What became of a shard: entries and samples written, samples by extension, what was left out."""

    split: str
    entries: int = 0
    samples: int = 0
    extensions: dict[str, int] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """What its record says beside the samples' number."""
        return {"entries": self.entries, "extensions": self.extensions, "rejects": self.rejects}


def write_release(
    release: Release,
    out: Path,
    *,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    shard_entries: int = 1000,
    workers: int = 1,
    overwrite: bool = False,
) -> list[Done]:
    """Write the shards ``SPLIT-000000.tar``, rejects.csv and the index; shards that an ended run left are kept.

    Args:
        release: What to write.
        out: Folder of the shards.
        options: What else the samples depend on; a run does not go on with what one of other options left.
        limit: At most so many entries of each split.
        shard_entries: Entries a shard.
        workers: Processes.
        overwrite: Whether shards in ``out`` may be replaced, and an ended run of something else given up.

    Raises:
        DataError: If ``out`` holds anything else, no entry can be used, files change while they are read, a process
            is killed, or another run writes there.
        InPlaceError: If all but moving the result was done before.
    """
    from data_prep.building.build_folder import BuildFolder, HopelessError

    if min(shard_entries, workers, 1 if limit is None else limit) < 1:
        raise DataError(f"--limit {limit}, --shard-entries {shard_entries}, --workers {workers}", fix="give at least 1")
    tasks = _plan(release, limit, shard_entries)
    if not tasks:
        raise DataError(f"{release.name} has no entries", fix="look at the folder that was given")
    request = {
        "release": release.name,
        "option": dict(options or {}),
        "file": _fingerprint(release.files),
        "plan": tasks,
        "provenance": dict(release.provenance),
    }
    build = BuildFolder(out.resolve(), overwrite)
    with build.opened(request):
        reports = _build(release, build, tasks, workers)
        if _fingerprint(release.files) != request["file"]:
            raise HopelessError(f"files of {release.name} changed while they were read", fix="run it again")
        build.publish()
    return reports


def _plan(release: Release, limit: int | None, size: int) -> list[Task]:
    tasks = []
    for split, entries in release.splits.items():
        count = len(entries) if limit is None else min(limit, len(entries))
        for number, start in enumerate(range(0, count, size)):
            tasks.append(Task(f"{split}-{number:06d}.tar", split, start, min(start + size, count)))
    return tasks


def _fingerprint(files: Iterable[Path]) -> dict[str, Any]:
    """How many files there are, and a digest of their paths, sizes and times; one that is missing counts too."""
    digest, count = hashlib.sha256(), 0
    for count, path in enumerate(files, start=1):  # noqa: B007 - the last one is the number
        try:
            found = path.stat()
            facts = f"{found.st_size} {found.st_mtime_ns}"
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and is_passing(error):
                raise
            facts = type(error).__name__
        digest.update(f"{str(path.absolute())!r} {facts}\n".encode())
    return {"count": count, "sha256": digest.hexdigest()}


def _build(release: Release, build: BuildFolder, tasks: Sequence[Task], workers: int) -> list[Done]:
    from data_prep.building.build_folder import HopelessError
    from data_prep.building.finished_shards import FinishedShards

    shards = FinishedShards(build.path, build.work)
    _write_shards(release, shards, tasks, workers)
    reports = [_reported(shards, task) for task in tasks]
    rejects = [reject for report in reports for reject in report.rejects]
    modalities = {name: release.modalities[name] for name, count in presence(release, reports).items() if count}
    if not modalities:
        first = rejects[0] if rejects else Reject("", 0, "", "no sample with a modality comes of it")
        raise HopelessError(
            f"none of {sum(task.stop - task.start for task in tasks)} entries of {release.name} can be used; "
            f"the first: {first.reason}",
            where=first.where,
            fix="look at the folder that was given",
        )
    _finish(replace(release, modalities=modalities), build.path, rejects)
    return reports


def presence(release: Release, reports: Iterable[Done]) -> dict[str, int]:
    """Samples by modality."""
    found = Counter[str]()
    for report in reports:
        found.update(report.extensions)
    return {name: sum(found[e] for e in extensions) for name, (extensions, _) in release.modalities.items()}


def _write_shards(release: Release, shards: FinishedShards, tasks: Sequence[Task], workers: int) -> None:
    """Write those that are not finished."""
    from data_prep.building.workers import in_processes
    from mmrep.progress import track

    todo = {task.name: task for task in tasks if _load(shards, task) is None}
    if len(todo) < len(tasks):
        print(f"{len(tasks) - len(todo)} of {len(tasks)} shards were there", file=sys.stderr)
    work = partial(_write_shard, release, shards, todo)
    for _ in track(in_processes(lambda: work, list(todo), min(workers, len(todo))), len(todo), "shards"):
        pass


def _reported(shards: FinishedShards, task: Task) -> Done:
    from data_prep.building.workers import WorkerKilledError

    report = _load(shards, task)
    if report is None:
        raise WorkerKilledError("a shard was damaged after it was written", where=task.name, fix="run the same again")
    return report


def _load(shards: FinishedShards, task: Task) -> Done | None:
    """What became of a shard that is finished."""
    record = shards.load(task.name)
    if record is None:
        return None
    try:
        rejects = [Reject(*reject) for reject in record["rejects"]]
        return Done(task.split, record["entries"], record["samples"], record["extensions"], rejects)
    except (KeyError, TypeError):
        return None


def _write_shard(release: Release, shards: FinishedShards, tasks: Mapping[str, Task], name: str) -> None:
    report = Done(tasks[name].split)
    shards.write(name, _samples(release, tasks[name], report), report.facts)


def _samples(release: Release, task: Task, report: Done) -> Iterator[dict[str, Any]]:
    extensions = Counter[str]()
    for number in range(task.start, task.stop):
        try:
            samples = release.make(task.split, release.splits[task.split][number])
        except (DataError, OSError) as error:
            if isinstance(error, OSError) and is_passing(error):
                raise
            report.rejects.append(_reject(task.split, number, error))
            continue
        report.entries += 1
        for place, members in enumerate(samples):
            extensions.update(members.keys())
            key = f"{task.split}-{number:08d}" + (f"-{place}" if len(samples) > 1 else "")
            yield {"__key__": key, **members}
    report.extensions = dict(extensions)


def _reject(split: str, number: int, error: DataError | OSError) -> Reject:
    where, what = (error.where, error.what) if isinstance(error, DataError) else (error.filename, error.strerror)
    return Reject(split, number, "" if where is None else str(where), str(what or error))


def _finish(release: Release, out: Path, rejects: Sequence[Reject]) -> None:
    """The list of rejects, and the index."""
    from mmrep.data.build import build_index
    from mmrep.data.index import Label, Modality
    from mmrep.files import replacing
    from mmrep.progress import progress

    with replacing(out / "rejects.csv") as part, part.open("w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Reject._fields)
        writer.writerows(rejects)
    with progress("index", len(list(out.glob("*.tar"))), "shards") as advance:
        index = build_index(
            out,
            {name: Modality(extensions, kind) for name, (extensions, kind) in release.modalities.items()},
            group_key=release.group_key,
            labels={name: Label(list(classes)) for name, classes in release.labels.items()},
            provenance={"dataset": release.name, "files": dict(release.provenance)},
            licences=release.licences,
            progress=advance,
        )
    index.save()
