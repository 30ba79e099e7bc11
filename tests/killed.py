"""Running a function in a forked process and ending it by a signal: imports are paid once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 60.0


def forked(work: Callable[[], int], log: Path) -> int:
    """Start ``work`` in a fork, its output in ``log``; gives the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        code = work()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(process: int, after: float = 0.0, by: signal.Signals | None = None) -> int:
    """Wait, send a signal if the process still runs, and give its exit code (minus the signal's number if that ended it)."""
    _wait(process, after)
    if by is not None and (code := _poll(process)) is None:
        os.kill(process, by)
    elif by is not None:
        return code  # type: ignore[return-value]  # it is no None
    code = _wait(process, PATIENCE)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise TimeoutError(f"process {process} did not end in {PATIENCE} s")
    return code


_codes: dict[int, int] = {}


def _poll(process: int) -> int | None:
    if process not in _codes:
        found, status = os.waitpid(process, os.WNOHANG)
        if not found:
            return None
        _codes[process] = os.waitstatus_to_exitcode(status)
    return _codes[process]


def _wait(process: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while (code := _poll(process)) is None and time.monotonic() < end:
        time.sleep(0.005)
    return code
