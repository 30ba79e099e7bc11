"""The command of a reader: the options that all share, the errors in one line, and what is printed at the end."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.building.command import answer
from data_prep.samples import Done, Release, presence, write_release

REASONS_SHOWN = 10
SHARED = ("out", "limit", "shard_entries", "workers", "overwrite")
"""Options of all readers; the others are a reader's own, and decide on the bytes."""


def summary(release: Release, reports: Sequence[Done]) -> str:
    """A line for each split: entries, samples, samples by modality; then what modality no sample has, and rejects by reason."""
    lines = []
    for split in release.splits:
        mine = [report for report in reports if report.split == split]
        parts = [f"{sum(r.entries for r in mine)} entries", f"{sum(r.samples for r in mine)} samples"]
        parts += [f"{count} {name}" for name, count in presence(release, mine).items()]
        lines.append(f"{split}: {', '.join(parts)}, {sum(len(r.rejects) for r in mine)} rejects")
    absent = [name for name, count in presence(release, reports).items() if not count]
    lines += [f"no sample has {name}: it is left out of index.json" for name in absent]
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
    return answer(lambda: _run(options, read))


def _run(options: argparse.Namespace, read: Callable[[argparse.Namespace], Release]) -> str:
    release = read(options)
    own = {name: value for name, value in vars(options).items() if name not in SHARED}
    reports = write_release(
        release,
        options.out,
        options={name: str(value.absolute()) if isinstance(value, Path) else value for name, value in own.items()},
        limit=options.limit,
        shard_entries=options.shard_entries,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    return summary(release, reports)
