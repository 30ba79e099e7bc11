"""Processes that a launcher started train together or not at all."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

from mmrep.cli.launch import Launch
from mmrep.errors import MmrepError

POLL = 0.2
"""Seconds between two looks at the store."""
PATIENCE = 30.0
"""Seconds until it is said that others are waited for."""
FAREWELL = 60.0
"""Seconds that a process that cannot start takes at most to tell the others."""
READY, FAILED, HEARD = "mmrep/start/ready", "mmrep/start/failed", "mmrep/start/heard"


class StartError(MmrepError):
    """Another process of the launch cannot start."""


class Meeting:
    """Where processes find out that one of them cannot start: no data on its disk, missing weights, a folder in the way.

    The others would wait for it in the making of the process group, for half an hour by default. Use it as a context; an error
    inside it, before `all_ready`, is told to the others. It costs a connection to the store at which the group is made.

    Args:
        launch: Of this process; nothing happens where it is None or of one process alone.
    """

    def __init__(self, launch: Launch | None) -> None:
        self._launch = launch if launch is not None and launch.world > 1 else None
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
        """
        if self._launch is None:
            return
        launch, self._launch = self._launch, None
        try:
            self._wait(launch, self._open(launch, seconds), seconds)
        except RuntimeError as error:  # of the store
            raise StartError("rank 0 has not started, or is gone", fix="see what it says itself") from error

    def _wait(self, launch: Launch, store: Any, seconds: float) -> None:
        began, said = time.monotonic(), False
        store.add(READY, 1)
        while (ready := store.add(READY, 0)) < launch.world:
            if store.check([FAILED]):
                reason = store.get(FAILED).decode()
                store.add(HEARD, 1)
                raise StartError(reason, fix="see what it says itself")
            waited, who = time.monotonic() - began, f"{ready} of {launch.world} processes started"
            if waited > seconds:
                raise StartError(
                    f"{who} within {seconds:g} s",
                    fix=f"see what the others say, and whether {launch.by} was called on all nodes; --hang_after is the time",
                )
            if waited > PATIENCE and launch.rank == 0 and not said:
                print(f"mmrep: {who} by {launch.by}; waiting for the others", file=sys.stderr, flush=True)
                said = True
            time.sleep(POLL)

    def _tell(self, launch: Launch, error: BaseException) -> None:
        """Say that this process cannot start; the first that says so counts. The host of the store waits until it was heard."""
        self._launch = None
        try:
            store = self._open(launch, FAREWELL)
            store.compare_set(FAILED, "", f"rank {launch.rank} cannot start: {_short(error)}")
            store.add(HEARD, 1)
            until = time.monotonic() + FAREWELL
            while launch.rank == 0 and store.add(HEARD, 0) < launch.world and time.monotonic() < until:
                time.sleep(POLL)
        except RuntimeError:  # nobody hosts a store there: none of the others can be waiting at it
            return

    def _open(self, launch: Launch, seconds: float) -> Any:
        from mmrep.ops.gather import open_store

        if self._store is None:
            host, port = launch.meeting_place()
            hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            self._store = open_store(host, port, launch.rank == 0 and not hosted_by_launcher, seconds)
        return self._store


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:400] if isinstance(error, MmrepError) else f"{type(error).__name__}: {lines[0][:300]}"
