"""Samples that cannot be used: what was wrong with each, where it is written down, and how many are too many.

Only faults of the contents come here: a checksum, an undecodable member, one above its bound. A disk or network that fails is
tried again and then raised, since leaving out what could not be read would make the order depend on the weather.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from mmrep.errors import DataError, Fault
from mmrep.stable_hash import stable_hash

if TYPE_CHECKING:  # `mmrep data` does without torch
    import torch

    from mmrep.batch import Batch

MOST_IN_A_ROW = 100
"""Spares that may fail one after another before it is no accident any more."""
MAX_BAD_FRACTION = 0.001
"""Share of the samples that may be faulty, unless the user says another."""


class FaultLog:
    """Counts the faulty samples that this rank met, and lists each once in a quarantine file.

    Args:
        path: A CSV to append to, which all ranks share; None for none.
        samples: Of the split.
        max_fraction: Share of them that may be faulty, rounded up to whole samples.
    """

    def __init__(self, path: Path | None, samples: int, max_fraction: float) -> None:
        self.path, self.samples, self.max_fraction = path, samples, max_fraction
        self.counts: Counter[tuple[str, str]] = Counter()
        self._known = {_identity(fault) for fault in read_quarantine(path)} if path and path.exists() else set()
        self._met: set[tuple[str, str, str]] = set()
        self._not_sent: list[int] = []
        self.met_by_all: set[int] = set()
        self._told = False

    def add(self, faults: Iterable[Fault]) -> None:
        """Note faults; each sample counts once, however often it is met."""
        for fault in faults:
            where = _identity(fault)
            if where in self._met:
                continue
            self._met.add(where)
            self._not_sent.append(stable_hash("\0".join(where)))
            self.counts[fault.shard, fault.reason] += 1
            if self.path is not None and where not in self._known:
                self._write(self.path, fault)

    def _write(self, path: Path, fault: Fault) -> None:
        """A disk that is full ends no training: the fault is counted, and not listed."""
        try:
            _append(path, fault)
        except OSError as error:
            if not self._told:
                print(
                    f"mmrep: warning: corrupt samples cannot be listed ({error.strerror}) [{path}]",
                    file=sys.stderr,
                    flush=True,
                )
            self._told = True

    def noting(self, batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
        """The batches of so many more samples; their faults are noted in passing."""
        self.samples += samples
        for batch in batches:
            self.add(batch.faults)
            yield batch

    def check_over_ranks(self, device: torch.device | str) -> None:
        """Stop when too many samples are faulty. A collective: every rank calls it.

        A sample that several ranks met, in different epochs, counts once.

        Raises:
            DataError: On all ranks, with the shards and reasons that this one met most.
        """
        import torch

        from mmrep.ops.gather import gather_rows, row_counts

        mine = torch.tensor(self._not_sent, dtype=torch.int64, device=device)
        counts = row_counts(len(mine), mine.device)
        if sum(counts):
            self.met_by_all.update(gather_rows(mine, counts).tolist())
            self._not_sent = []
        total, allowed = len(self.met_by_all), math.ceil(self.max_fraction * self.samples)
        if total > allowed:
            most = "; ".join(f"{shard}: {count} {reason}" for (shard, reason), count in self.counts.most_common(3))
            raise DataError(
                f"{total} samples cannot be used, more than the {allowed} of data.max_bad_fraction={self.max_fraction:g}"
                + (f" ({most})" if most else ""),
                where=self.path,
                fix="leave them out: mmrep data index DIR --exclude QUARANTINE.csv, or raise data.max_bad_fraction",
            )


def read_quarantine(path: Path) -> list[Fault]:
    """The faults of a quarantine file.

    Raises:
        DataError: If it is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                Fault(**{field.name: row[field.name] or "" for field in fields(Fault)}) for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"no quarantine file ({error})", where=path) from error


def _identity(fault: Fault) -> tuple[str, str, str]:
    return fault.shard, fault.sha256, fault.key


def _append(path: Path, fault: Fault) -> None:
    """Add one line, under a lock, so that ranks do not tear each other's lines and one of them writes the heading.

    The whole line or, where there is no room for it, nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size, line = os.fstat(file.fileno()).st_size, io.StringIO(newline="")
        writer = csv.writer(line)
        if not size:
            writer.writerow([field.name for field in fields(Fault)])
        writer.writerow(astuple(fault))
        content = line.getvalue().encode("utf-8", errors="replace")
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise
