"""Processes that fork once and run functions together as the ranks of a gloo group: imports cost 20 CPU-seconds each."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WATCHDOG = 30.0
"""Seconds until a rank that does not answer counts as hanging."""


class GlooPool:
    """``world`` forked processes in one process group."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[tuple[Any, Connection]] = []

    def __enter__(self) -> GlooPool:
        context = multiprocessing.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, self.world, Path(self._folder.name) / "store"), daemon=True
            )
            process.start()
            self._workers.append((process, ours))
        return self

    def __exit__(self, *_: object) -> None:
        for process, _connection in self._workers:
            process.kill()
        self._folder.cleanup()

    def run(
        self, function: Callable[..., Any], per_rank: Sequence[tuple[Any, ...]], timeout: float = WATCHDOG
    ) -> list[Any]:
        """Call ``function(*per_rank[r])`` on every rank r; gives the results, or fails with a rank's traceback."""
        for (_, connection), arguments in zip(self._workers, per_rank, strict=True):
            connection.send((function, arguments))
        results = []
        for rank, (_, connection) in enumerate(self._workers):
            if not connection.poll(timeout):
                answers = [other.recv()[1] for _, other in self._workers if other.poll()]
                self._restart()
                raise TimeoutError(
                    f"rank {rank} did not answer in {timeout} s: the ranks hang in a collective; {answers}"
                )
            failed, value = connection.recv()
            if failed:
                self._restart()
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def _restart(self) -> None:
        self.__exit__()
        self._workers = []
        self.__enter__()


def _serve(connection: Connection, rank: int, world: int, store: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((False, function(*arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
