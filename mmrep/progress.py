"""Progress of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUICK_SECONDS = 5.0
"""Work that takes less says nothing in a log."""


@contextmanager
def progress(title: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; elsewhere one line, if it took long. Gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, start, done = Console(stderr=True), time.monotonic(), 0
    what, rate = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(task, completed=done, rate=f"{done / max(1e-9, time.monotonic() - start):.1f}/s")

        yield advance
    if not console.is_terminal and time.monotonic() - start > QUICK_SECONDS:
        print(f"{title}: {total} {unit} in {time.monotonic() - start:.1f} s", file=sys.stderr)
