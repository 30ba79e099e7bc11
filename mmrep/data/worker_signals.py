"""Loader workers and the signals that ask a run to stop: the process that made the workers answers, and ends them.

A launcher, a scheduler and a terminal send SIGTERM, SIGUSR1 and SIGINT to every process of a group. A worker that died of one
would end the run in the middle of a step; one that answered with a handler of its parent would do so once more.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def blocked() -> Iterator[None]:
    """Processes that begin inside have the signals blocked from their first instruction on; here they arrive afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_parent(then: Callable[[int], None] | None, worker: int) -> None:
    """The first that a worker does, where the signals are `blocked`: it ends by SIGTERM of its parent alone.

    So torch ends a worker that hangs; its own handler of SIGTERM tells the parent's from others too, but dies of both.

    Args:
        then: The loader's own ``worker_init_fn``.
        worker: Number of the worker.
    """
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_with_the_parent, name="mmrep-worker-signals", daemon=True).start()
    else:  # macOS cannot tell who sent it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if then is not None:
        then(worker)


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)  # another code counts as a fault of the worker
