"""Progress of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

QUICK_SECONDS = 5.0
"""Work that takes less says nothing in a log."""
SECONDS_BETWEEN_LINES = 30.0
"""Of a log."""
SECONDS_BETWEEN_BARS = 0.1
"""Of a terminal."""

T = TypeVar("T")


@contextmanager
def progress(title: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal; elsewhere a line now and then, and one at the end, if it takes long.

    Gives the function that advances it. Nothing is drawn by a thread, so that processes may be forked meanwhile.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, start, done = Console(stderr=True), time.monotonic(), 0
    terminal = console.is_terminal
    due = start if terminal else start + SECONDS_BETWEEN_LINES
    what, pace = TextColumn("{task.description}"), TextColumn("{task.fields[rate]}")
    columns = (what, BarColumn(), MofNCompleteColumn(), pace, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not terminal, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(title, total=total, rate="")
        bar.refresh()

        def advance(count: int) -> None:
            nonlocal done, due
            done += count
            now = time.monotonic()
            if now <= due and not (terminal and done == total):
                return
            rate = done / max(1e-9, now - start)
            if terminal:
                due = now + SECONDS_BETWEEN_BARS
                bar.update(task, completed=done, rate=f"{rate:.1f}/s", refresh=True)
                return
            due, left = now + SECONDS_BETWEEN_LINES, (total - done) / max(1e-9, rate)
            print(f"{title}: {done}/{total} {unit}, {rate:.1f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

        yield advance
    if not terminal and time.monotonic() - start > QUICK_SECONDS:
        print(f"{title}: {total} {unit} in {time.monotonic() - start:.1f} s", file=sys.stderr)


def track(items: Iterable[T], total: int, title: str, unit: str = "done") -> Iterator[T]:
    """Pass items on and show how far they are, as `progress` does."""
    with progress(title, total, unit) as advance:
        for item in items:
            advance(1)
            yield item
