"""Doing something for each of many names: here, or in processes that end with this one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mmrep.errors import DataError

SECONDS_BETWEEN_LOOKS = 0.5

Work = Callable[[str], Any]


class WorkerKilledError(DataError):
    """A process is gone; what others finished is there."""


def in_processes(make: Callable[[], Work], names: Sequence[str], workers: int) -> Iterator[tuple[str, Any]]:
    """Do all of them.

    Args:
        make: Makes what does one; called once in each process.
        names: Of what is to be done.
        workers: Processes; 1 is this one.

    Yields:
        The name and what came of it, in order.

    Raises:
        WorkerKilledError: If a process is killed; the others are ended.
    """
    if not names:
        return
    if workers == 1:
        work = make()
        yield from ((name, work(name)) for name in names)
        return
    importlib.import_module("webdataset")  # seconds, once here instead of once in every fork
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (make, os.getpid()))
    try:
        yield from zip(names, pool.map(_do, names), strict=True)
        pool.shutdown()
    except BrokenProcessPool as error:
        raise WorkerKilledError(
            "a worker process was killed",
            fix="run the same again: what is finished is kept; if memory ran out, with fewer --workers",
        ) from error
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # only after an error are there any
        pool.shutdown(cancel_futures=True)


_work: Work | None = None


def _start(make: Callable[[], Work], parent: int) -> None:
    global _work
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends it
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _work = make()


def _do(name: str) -> Any:
    assert _work is not None
    return _work(name)


def _end_with(parent: int) -> None:
    """A parent that is killed leaves its processes waiting for ever."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
