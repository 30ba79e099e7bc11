"""Processes that a launcher started train together or not at all."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mmrep.cli.launch import Launch
from mmrep.errors import MmrepError
from mmrep.modules.fault_tolerance.preemption import PreemptedError, told

POLL = 0.2
"""Seconds between two looks at the store."""
TRY = 2.0
"""Seconds that one attempt to reach the store takes at most; in between a signal is noticed."""
PATIENCE = 30.0
"""Seconds until it is said that others are waited for."""
FAREWELL = 60.0
"""Seconds that the host of the store stays for those who have not heard that the run does not start."""
HURRY = 5.0
"""The same where it was told to stop: a scheduler kills it after a while."""
READY, OUTCOME, HEARD = "mmrep/start/ready", "mmrep/start/outcome", "mmrep/start/heard"
GO, STOP = "go", "stop"


class StartError(MmrepError):
    """Another process of the launch cannot start."""


class Meeting:
    """Where processes find out that one of them cannot start: no data on its disk, missing weights, a folder in the way.

    The others would wait for it in the making of the process group, for half an hour by default. Use it as a context; an error
    inside it, before `all_ready`, is told to the others. It costs a connection to the store at which the group is made.

    Who first sees that all are ready, cannot start, is told to stop or has waited too long, writes the outcome; all follow it.

    Args:
        launch: Of this process; nothing happens where it is None or of one process alone.
        stopped: Whether this process was told to stop.
    """

    def __init__(self, launch: Launch | None, stopped: Callable[[], bool] = lambda: False) -> None:
        self._launch = launch if launch is not None and launch.world > 1 else None
        self._stopped = stopped
        self._store: Any = None

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._launch is not None:
            self._tell(self._launch, error)

    def all_ready(self, seconds: float) -> None:
        """Wait until every process has come here.

        Raises:
            StartError: If one of them says that it cannot start, or is not heard of for a time.
            PreemptedError: If this process or another one was told to stop.
        """
        if self._launch is None:
            return
        launch, self._launch = self._launch, None
        try:
            self._open(launch, seconds)
            outcome = self._wait(launch, seconds)
        except RuntimeError as error:  # of the store
            raise StartError("rank 0 has not started, or is gone", fix="see what it says itself") from error
        if outcome == STOP:
            raise PreemptedError(told("before the first step", None))
        if outcome != GO:
            raise StartError(outcome, fix="see what it says itself")

    def _wait(self, launch: Launch, seconds: float) -> str:
        """The outcome."""
        began, said = time.monotonic(), False
        self._store.add(READY, 1)
        while not self._store.check([OUTCOME]):
            ready = self._store.add(READY, 0)
            if ready == launch.world or self._stopped():
                self._settle(GO if ready == launch.world else STOP)
                continue
            waited, who = time.monotonic() - began, f"{ready} of {launch.world} processes started"
            late = f"{who} within {seconds:g} s"
            if waited > seconds and self._settle(late) == late:
                self._store.add(HEARD, 1)
                raise StartError(
                    late,
                    fix=f"see what the others say, and whether {launch.by} was called on all nodes; --hang_after is the time",
                )
            if waited > PATIENCE and launch.rank == 0 and not said:
                print(f"mmrep: {who} by {launch.by}; waiting for the others", file=sys.stderr, flush=True)
                said = True
            time.sleep(POLL)
        outcome: str = self._store.get(OUTCOME).decode()
        if outcome != GO:
            self._stay(launch)
        return outcome

    def _tell(self, launch: Launch, error: BaseException) -> None:
        """Say that this process cannot start."""
        self._launch = None
        try:
            self._open(launch, FAREWELL)
            self._settle(f"rank {launch.rank} cannot start: {_short(error)}")
            self._stay(launch)
        except (RuntimeError, PreemptedError):  # nobody hosts a store there: none of the others can be waiting at it
            return

    def _settle(self, outcome: str) -> str:
        """Write the outcome, unless there is one; gives the one that holds."""
        held: str = self._store.compare_set(OUTCOME, "", outcome).decode()
        return held

    def _stay(self, launch: Launch) -> None:
        """Until all have heard the outcome, where the store is this process's."""
        self._store.add(HEARD, 1)
        began = time.monotonic()
        while launch.rank == 0 and self._store.add(HEARD, 0) < launch.world:
            if time.monotonic() - began > (HURRY if self._stopped() else FAREWELL):
                return
            time.sleep(POLL)

    def _open(self, launch: Launch, seconds: float) -> None:
        from mmrep.ops.gather import open_store

        host, port = launch.meeting_place()
        is_host = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not is_host:
            self._await_host(host, port, seconds)
        self._store = open_store(host, port, is_host, FAREWELL)

    def _await_host(self, host: str, port: int, seconds: float) -> None:
        """Not in the store's own code, which waits in one piece and keeps Python from noticing a signal.

        Raises:
            RuntimeError: If nobody listens there in time.
            PreemptedError: If this process was told to stop.
        """
        until = time.monotonic() + seconds
        while True:
            if self._stopped():
                raise PreemptedError(told("before the first step", None))
            try:
                socket.create_connection((host, port), TRY).close()
                return
            except OSError:
                if time.monotonic() > until:
                    raise RuntimeError(f"nobody listens at {host}:{port}") from None
            time.sleep(POLL)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:400] if isinstance(error, MmrepError) else f"{type(error).__name__}: {lines[0][:300]}"
