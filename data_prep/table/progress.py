"""Progress over shards: a bar on a terminal, a line now and then elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} rows/s")


def follow(done: Iterable[tuple[str, Any]], sizes: Mapping[str, int]) -> Iterator[str]:
    """Pass names of shards on and show how many of their rows are done.

    Args:
        done: The shards as they are finished, and what came of them.
        sizes: Rows of each.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _lines(done, sizes)
        return
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("rows", total=sum(sizes.values()))
        for name, _ in done:
            progress.advance(task, sizes[name])
            yield name


def _lines(done: Iterable[tuple[str, Any]], sizes: Mapping[str, int]) -> Iterator[str]:
    start, ready, total = time.monotonic(), 0, sum(sizes.values())
    due = start + SECONDS_BETWEEN_LINES
    for name, _ in done:
        ready += sizes[name]
        now = time.monotonic()
        if now >= due or ready == total:
            rate = ready / max(now - start, 1e-9)
            print(
                f"{ready}/{total} rows, {rate:.0f} rows/s, {(total - ready) / rate:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            due = now + SECONDS_BETWEEN_LINES
        yield name
