"""A rank that dies or hangs ends the others with a line, instead of leaving them in a collective for ever.

gloo notices a closed connection at once; NCCL waits until the timeout of the process group. Here each rank gives signs of life
through the store that the ranks met at, and watches its neighbour's.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from mmrep.errors import MmrepError
from mmrep.modules.fault_tolerance.preemption import PreemptedError
from mmrep.ops.gather import is_of_other_ranks, rank, shared_store, world_size

PERIOD = 2.0
"""Seconds between signs of life."""
GRACE = 15.0
"""Seconds for a rank to meet the fault by itself, in a collective that fails, before it is ended."""
WAY_OUT = 30.0
"""Seconds that a rank may need to leave after its own error: what it frees may wait for a collective that never ends."""
GO_ON = "the same command with --resume auto goes on from the last checkpoint"
_runs = itertools.count()


class LostRankError(MmrepError):
    """Another rank died, failed, or hangs."""


class Watchdog(Callback):
    """Signs of life, and what to do when they stop.

    Args:
        silence: Seconds without one after which a rank counts as lost.
        timeout: Of the process group, in seconds, for messages.

    Attributes:
        work: Batches that this rank has begun, by `BatchCount`.
    """

    def __init__(self, silence: float = 35.0, timeout: float = 1800.0) -> None:
        self.silence, self.timeout = silence, timeout
        self.reason: str | None = None
        self._left, self._noticed = threading.Event(), threading.Event()
        self._store: Any = None
        self.work, self._beats, self._heard = 0, 0, 0.0
        self._neighbour = ("", 0.0)
        self._exit: threading.Timer | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """For ``ddp_spawn``, which pickles callbacks: each process makes its own threads and events."""
        return type(self), (self.silence, self.timeout)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._store is not None or world_size() == 1:
            return
        self._store, self._prefix = shared_store(), f"mmrep/watch/{next(_runs)}"
        self._heard = time.monotonic()
        self._neighbour = ("", self._heard)
        for loop in (self._talk, self._guard):
            threading.Thread(target=loop, name=f"mmrep-watchdog{loop.__name__}", daemon=True).start()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell the others why this rank leaves, or find out which of them is at fault."""
        if self._store is None or isinstance(exception, PreemptedError):
            self.leave()
            return
        self._noticed.set()
        self._exit = threading.Timer(WAY_OUT, os._exit, [2])  # before any word to the store, which may be cut off
        self._exit.daemon = True
        self._exit.start()
        if is_of_other_ranks(exception):
            self._find_out()
        else:
            first = (str(exception).strip().splitlines() or [""])[0]
            self.blame(f"rank {rank()} failed ({type(exception).__name__}: {first[:200]})")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.leave()

    def leave(self) -> None:
        """The run is over for this rank, and no fault."""
        if self._store is not None and not self._left.is_set():
            self._left.set()
            with suppress(RuntimeError):  # the host of the store may have left before
                self._store.set(f"{self._prefix}/left/{rank()}", "1")

    @property
    def over(self) -> bool:
        """Whether this rank has come to its end, or is on the way there, by itself."""
        return self._left.is_set() or self._noticed.is_set()

    def close(self) -> None:
        """Where the process goes on after all, or has nothing left that could hang."""
        self._left.set()
        if self._exit is not None and not torch.cuda.is_available():
            self._exit.cancel()

    def blame(self, reason: str) -> None:
        """Note what ends the run, for this rank and the others; the first reason stays."""
        self.reason = self.reason or reason
        if self._store is not None:
            with suppress(RuntimeError):  # the host of the store may be gone, which each rank finds out
                self._store.compare_set(f"{self._prefix}/fault", "", self.reason)

    def error(self, cause: BaseException) -> LostRankError | None:
        """What to say instead of an error of a collective; None for errors of this rank's own."""
        if self._store is None or not is_of_other_ranks(cause):
            return None
        return LostRankError(self.reason or "another rank died or was lost", fix=GO_ON)

    def _find_out(self) -> None:
        """Wait for the ranks to notice whose signs of life have stopped."""
        until = time.monotonic() + 5 * PERIOD
        try:
            self._store.set(f"{self._prefix}/alarm", "1")
            while self.reason is None and time.monotonic() < until:
                time.sleep(PERIOD / 10)
            if self.reason is None:
                self.blame(self._stuck())
        except RuntimeError:
            self.reason = self.reason or "rank 0 died, or its machine cannot be reached"

    def _stuck(self) -> str:
        """All are alive: who has begun fewer batches than others keeps them waiting."""
        works = [int((self._read(f"beat/{number}") or "0 0").split()[1]) for number in range(world_size())]
        slow = ", ".join(str(number) for number, work in enumerate(works) if work < max(works))
        if not slow:
            return f"the ranks are alive and do not meet in a collective within {self.timeout:g} s"
        return f"rank {slow} is stuck: alive, but not heard of in a collective for {self.timeout:g} s"

    def _talk(self) -> None:
        """Give signs of life, and look for a fault, until there is one."""
        try:
            while not self._left.is_set() and self.reason is None:
                self._beats += 1
                self._store.set(f"{self._prefix}/beat/{rank()}", f"{self._beats} {self.work} {_here()}")
                self.reason = self.reason or self._read("fault") or None
                self._watch_neighbour()
                self._heard = time.monotonic()
                self._left.wait(PERIOD)
        except RuntimeError:
            self.reason = self.reason or "rank 0 died, or its machine cannot be reached"

    def _watch_neighbour(self) -> None:
        number, now = (rank() + 1) % world_size(), time.monotonic()
        beat = self._read(f"beat/{number}") or ""
        if beat != self._neighbour[0]:
            self._neighbour = (beat, now)
        silence = 3 * PERIOD if self._read("alarm") else self.silence
        if now - self._neighbour[1] > silence and not self._read(f"left/{number}"):
            who = f" ({beat.split(maxsplit=2)[2]})" if beat else ""
            self.blame(f"rank {number}{who} died, or its machine cannot be reached")

    def _guard(self) -> None:
        """End this process if its main thread does not meet the fault by itself."""
        late = 0
        while not self._left.wait(PERIOD):
            late = late + 1 if time.monotonic() - self._heard > self.silence else 0
            if late > 1:
                self.reason = self.reason or f"the store of the ranks does not answer for {self.silence:g} s"
            if self.reason is not None:
                if not self._noticed.wait(GRACE) and not self._left.is_set():
                    end(self.reason)
                return

    def _read(self, name: str) -> str | None:
        """A key of the store, or None where nobody has set it."""
        key = f"{self._prefix}/{name}"
        return self._store.get(key).decode() if self._store.check([key]) else None


class BatchCount(Callback):
    """Counts for the watchdog the batches that were begun. It comes last: a callback before it may hang."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog

    def on_train_batch_start(self, *args: Any) -> None:
        self.watchdog.work += 1

    def on_validation_batch_start(self, *args: Any) -> None:
        self.watchdog.work += 1


def end(reason: str) -> NoReturn:
    """Leave at once, from any thread, with a line."""
    print(f"mmrep: error: {reason}; {GO_ON}", file=sys.stderr, flush=True)
    os._exit(2)


def _here() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
