"""Progress of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

QUICK_SECONDS = 5.0
"""Work that takes less says nothing in a log."""
SECONDS_BETWEEN_LINES = 30.0
"""Of a log."""


@contextmanager
def progress(title: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; elsewhere a line now and then, and one at the end, if it takes long.

    Gives the function that advances it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, start, done = Console(stderr=True), time.monotonic(), 0
    due = start + SECONDS_BETWEEN_LINES
    what, pace = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), pace, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            nonlocal done, due
            done += count
            now = time.monotonic()
            rate = done / max(1e-9, now - start)
            bar.update(task, completed=done, rate=f"{rate:.1f}/s")
            if not console.is_terminal and now > due:
                due, left = now + SECONDS_BETWEEN_LINES, (total - done) / max(1e-9, rate)
                print(f"{title}: {done}/{total} {unit}, {rate:.1f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

        yield advance
    if not console.is_terminal and time.monotonic() - start > QUICK_SECONDS:
        print(f"{title}: {total} {unit} in {time.monotonic() - start:.1f} s", file=sys.stderr)
