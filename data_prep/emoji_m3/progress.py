"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Passes the items on and reports on stderr how far they are."""
    return _bar(items, total, what) if sys.stderr.isatty() else _lines(items, total, what)


def _bar(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}")
    # No refresh thread: the shards' processes are forked while the bar is shown.
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task(what, total=total, rate="")
        progress.refresh()
        start = time.monotonic()
        for done, item in enumerate(items, 1):
            rate = done / max(time.monotonic() - start, 1e-9)
            progress.update(task, completed=done, rate=f"{rate:.1f}/s", refresh=True)
            yield item


def _lines(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    start = time.monotonic()
    for done, item in enumerate(items, 1):
        if done == total or done * 10 // total > (done - 1) * 10 // total:
            rate = done / max(time.monotonic() - start, 1e-9)
            line = f"{what}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left"
            print(line, file=sys.stderr, flush=True)
        yield item
