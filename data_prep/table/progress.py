"""Progress over shards: a bar on a terminal, a line now and then elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} rows/s")


def follow(shards: Iterable[T], sizes: Sequence[int]) -> Iterator[T]:
    """Pass shards on and show how many of their rows are done.

    Args:
        shards: As they are finished.
        sizes: Rows of each.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(shards, sizes)
        return
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=sum(sizes))
        for shard, size in zip(shards, sizes, strict=True):
            progress.advance(task, size)
            yield shard


def _lines(shards: Iterable[T], sizes: Sequence[int]) -> Iterator[T]:
    start, done, total = time.monotonic(), 0, sum(sizes)
    due = start + SECONDS_BETWEEN_LINES
    for shard, size in zip(shards, sizes, strict=True):
        done += size
        now = time.monotonic()
        if now >= due or done == total:
            rate = done / max(now - start, 1e-9)
            print(
                f"{done}/{total} rows, {rate:.0f} rows/s, {(total - done) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            due = now + SECONDS_BETWEEN_LINES
        yield shard
