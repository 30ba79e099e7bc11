"""Entries of a published data set -> shards and their index: what the readers of the field's layouts share.

An entry is what the release counts: a picture with its captions, a row, a segment. Shard n of a split is made of the entries
from n * S to (n + 1) * S and of nothing else, so a run that ended goes on where it stopped, and the number of processes changes
no byte. An entry that cannot be used is listed in rejects.csv and ends nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmrep.errors import DataError, MmrepError

JOURNAL = "unfinished.jsonl"
"""In a folder whose run has not ended: the settings, then a line for each shard that is done."""
OWN_FILES = ("*.tar", "*.tar.part", "index.json", "index.json.part", "rejects.csv", JOURNAL)
"""What is written here, and therefore may be removed."""
REASONS_SHOWN = 10

Members = Mapping[str, Any]
"""Extension -> content of a sample, as `mmrep.data.writer.write_shard` takes it, without the key."""


@dataclass(frozen=True)
class Release:
    """A data set as it was released, ready to be written.

    Attributes:
        name: Of the data set.
        splits: Split -> its entries, each cheap to name; what is large is read by ``make``.
        make: From the split and an entry to its samples; raises DataError or OSError where the entry cannot be used.
        modalities: Modality -> ``(extensions, kind)``.
        group_key: Field of the samples' JSON: samples with equal values are right answers to each other.
        labels: Field of the samples' JSON -> its classes.
        provenance: What it was made from.
        licences: Of its parts.
    """

    name: str
    splits: Mapping[str, Sequence[Any]]
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

    name: str
    split: str
    entries: int = 0
    samples: int = 0
    extensions: dict[str, int] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Done:
        """From a line of the journal."""
        return cls(**{**line, "rejects": [Reject(*reject) for reject in line["rejects"]]})


def write_release(
    release: Release,
    out: Path,
    *,
    limit: int | None = None,
    shard_entries: int = 1000,
    workers: int = 1,
    overwrite: bool = False,
) -> list[Done]:
    """Write the shards ``SPLIT-000000.tar``, rejects.csv and the index; shards that an ended run left are kept.

    Args:
        release: What to write.
        out: Folder of the shards.
        limit: At most so many entries of each split.
        shard_entries: Entries a shard.
        workers: Processes.
        overwrite: Whether shards that this module wrote may be replaced.

    Raises:
        DataError: If ``out`` holds anything else, no entry can be used, or a process is killed.
    """
    if min(shard_entries, workers, 1 if limit is None else limit) < 1:
        raise DataError(f"--limit {limit}, --shard-entries {shard_entries}, --workers {workers}", fix="give at least 1")
    tasks = _plan(release, limit, shard_entries)
    if not tasks:
        raise DataError(f"{release.name} has no entries", fix="look at the folder that was given")
    settings = {"release": release.name, "provenance": dict(release.provenance), "tasks": tasks}
    done = _begin(out, settings, overwrite)
    _write_shards(release, out, [task for task in tasks if task.name not in done], workers, done)
    reports = [done[task.name] for task in tasks]
    rejects = [reject for report in reports for reject in report.rejects]
    if not any(report.samples for report in reports):
        first = rejects[0]
        raise DataError(
            f"none of {len(rejects)} entries of {release.name} can be used; the first: {first.reason}",
            where=first.where,
            fix="look at the folder that was given",
        )
    _finish(release, out, rejects)
    return reports


def _plan(release: Release, limit: int | None, size: int) -> list[Task]:
    tasks = []
    for split, entries in release.splits.items():
        count = len(entries) if limit is None else min(limit, len(entries))
        for number, start in enumerate(range(0, count, size)):
            tasks.append(Task(f"{split}-{number:06d}.tar", split, start, min(start + size, count)))
    return tasks


def _begin(out: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Done]:
    """Make the folder ready; gives the shards that are done already."""
    from mmrep.data.index import remove_arrays

    settings = json.loads(json.dumps(settings))
    journal = out / JOURNAL
    if overwrite and out.is_dir():
        for path in (path for pattern in OWN_FILES for path in out.glob(pattern)):
            path.unlink()
        remove_arrays(out)
    elif journal.is_file():
        lines = list(_journal_lines(journal))
        if not lines or lines[0] != settings:
            raise DataError(
                "the folder holds a run of other files or options", where=out, fix="pass --overwrite to begin anew"
            )
        found = [Done.parse(line) for line in lines[1:]]
        found = [report for report in found if not report.samples or (out / report.name).is_file()]
        # Rewritten whole, so that a line which a killed run cut short is not in the way of the next.
        _rewrite(journal, settings, found)
        return {report.name: report for report in found}
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError("the folder is not empty", where=out, fix="choose another --out, or pass --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    _rewrite(journal, settings, [])
    return {}


def _journal_lines(path: Path) -> Iterator[Any]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while writing it
            return


def _rewrite(journal: Path, settings: dict[str, Any], reports: Sequence[Done]) -> None:
    from mmrep.files import replacing

    with replacing(journal) as part:
        part.write_text("".join(f"{json.dumps(line)}\n" for line in (settings, *map(asdict, reports))))


def _write_shards(release: Release, out: Path, tasks: Sequence[Task], workers: int, done: dict[str, Done]) -> None:
    """Write what is left, and note each shard in the journal when it is whole."""
    from data_prep.emoji_m3.progress import track

    with (out / JOURNAL).open("a", encoding="utf-8") as journal:
        for report in track(_results(release, out, tasks, workers), len(tasks), f"shards of {release.name}"):
            done[report.name] = report
            journal.write(json.dumps(asdict(report)) + "\n")
            journal.flush()


def _results(release: Release, out: Path, tasks: Sequence[Task], workers: int) -> Iterator[Done]:
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield _write_shard(release, out, task)
        return
    importlib.import_module("webdataset")  # seconds, once here instead of once in every fork
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _adopt, (release, out)) as pool:
            yield from pool.map(_write_adopted, tasks)
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed", fix="if memory ran out, try --workers 1") from error


_ADOPTED: list[tuple[Release, Path]] = []
"""What a worker process works on: handed over by the fork, since a release need not be picklable."""


def _adopt(release: Release, out: Path) -> None:
    _ADOPTED[:] = [(release, out)]


def _write_adopted(task: Task) -> Done:
    return _write_shard(*_ADOPTED[0], task)


def _write_shard(release: Release, out: Path, task: Task) -> Done:
    from mmrep.data.writer import write_shard

    report = Done(task.name, task.split)
    report.samples = write_shard(out / task.name, _samples(release, task, report))
    if not report.samples:
        (out / task.name).unlink()
    return report


def _samples(release: Release, task: Task, report: Done) -> Iterator[dict[str, Any]]:
    extensions = Counter[str]()
    for number in range(task.start, task.stop):
        try:
            samples = release.make(task.split, release.splits[task.split][number])
        except (DataError, OSError) as error:
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
    """The list of rejects, and the index; the journal goes when both are there."""
    from mmrep.data.build import build_index
    from mmrep.data.index import Label, Modality
    from mmrep.files import replacing
    from mmrep.progress import progress

    with replacing(out / "rejects.csv") as part, part.open("w", encoding="utf-8", newline="") as file:
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
    (out / JOURNAL).unlink()


def summary(release: Release, reports: Sequence[Done]) -> str:
    """A line for each split: entries, samples, samples by modality; then the rejects by reason."""
    lines = []
    for split in release.splits:
        mine = [report for report in reports if report.split == split]
        extensions = Counter[str]()
        for report in mine:
            extensions.update(report.extensions)
        held = {name: sum(extensions[e] for e in known) for name, (known, _) in release.modalities.items()}
        parts = [f"{sum(r.entries for r in mine)} entries", f"{sum(r.samples for r in mine)} samples"]
        parts += [f"{count} {name}" for name, count in held.items()]
        lines.append(f"{split}: {', '.join(parts)}, {sum(len(r.rejects) for r in mine)} rejects")
    reasons = Counter(reject.reason.partition(" (")[0] for report in reports for reject in report.rejects)
    lines += [f"  {count} x {reason}" for reason, count in reasons.most_common(REASONS_SHOWN)]
    return "\n".join([*lines, "rejects are listed in rejects.csv"] if reasons else lines)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all readers share; each adds its own, ``--root`` above all."""
    first = (description or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m data_prep.{name}", description=first)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the shards and their index.json")
    add("--limit", type=int, metavar="N", help="at most N entries of each split, for a try")
    add("--shard-entries", type=int, default=1000, metavar="N", help="entries a shard (default 1000)")
    add("--workers", type=int, default=2, help="processes (default 2)")
    add("--overwrite", action="store_true", help="replace shards that this command wrote")
    return parser


def run(
    parser: argparse.ArgumentParser, read: Callable[[argparse.Namespace], Release], argv: Sequence[str] | None
) -> int:
    """Read a release as the options say and write it; gives 0, or 2 after an error that the user can mend."""
    options = parser.parse_args(argv)
    try:
        release = read(options)
        reports = write_release(
            release,
            options.out,
            limit=options.limit,
            shard_entries=options.shard_entries,
            workers=options.workers,
            overwrite=options.overwrite,
        )
    except (MmrepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(release, reports))
    return 0
