"""Jobs in fresh processes: each is forked from this one, does one job and ends."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import TypeVar

from mmrep.errors import DataError

J = TypeVar("J")


def run_forked(work: Callable[[J], None], jobs: Sequence[J], workers: int) -> Iterator[J]:
    """Runs ``work(job)`` for every job, at most ``workers`` at a time, and yields each job as it ends, in any order.

    Raises:
        DataError: A job failed or its process was killed; the others are stopped.
    """
    waiting = deque(jobs)
    running: dict[int, tuple[J, ForkProcess, Connection]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                process, errors = _start(work, job)
                running[process.sentinel] = (job, process, errors)
            ended = set(wait(list(running)))
            for sentinel in [one for one in running if one in ended]:
                job, process, errors = running.pop(sentinel)
                _finish(job, process, errors)
                yield job
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.join()


def _start(work: Callable[[J], None], job: J) -> tuple[ForkProcess, Connection]:
    context = multiprocessing.get_context("fork")
    errors, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, job, writer))
    process.start()
    writer.close()
    return process, errors


def _child(work: Callable[[J], None], job: J, errors: Connection) -> None:
    # Ctrl-C is the parent's to handle: it stops its children, and nobody prints a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(job)
    except Exception as error:  # whatever it is, the parent reports it
        errors.send(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


def _finish(job: J, process: ForkProcess, errors: Connection) -> None:
    process.join()
    if process.exitcode:
        try:
            reason = str(errors.recv())
        except EOFError:
            reason = f"its process ended with code {process.exitcode}"
        raise DataError(f"{job} failed: {reason}", fix="run the same command again to go on from here")
    errors.close()
