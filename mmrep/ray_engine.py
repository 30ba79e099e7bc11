"""Ray Data as the engine of a job over shards: a shard is a row, an actor a worker that is made once.

A worker that dies is started anew and its shard is tried again, by Ray itself. What a worker raises comes back as the error
it was, after the other shards are done.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmrep import errors
from mmrep.errors import ConfigError, DataError, MmrepError

LOCAL = "local"
MOST_RETRIES = 3
"""How often a worker that died is started anew, and a shard tried again."""
MOST_FAILED = 10
"""Shards that may fail before the job gives up: then something is wrong with all of them."""
MOST_BLOCKS = 10_000
"""Of Ray Data: with more shards, several are in one."""
SECONDS_TO_REACH = 10.0
"""Of a cluster's address."""

Worker = Callable[[str], Any]
"""Does one shard by its name; gives what JSON can hold."""


@dataclass(frozen=True)
class RaySettings:
    """Where the workers run, and what each needs.

    Attributes:
        address: ``local`` starts Ray on this machine for the time of the job; else that of a cluster (``auto``, ``HOST:PORT``,
            ``ray://HOST:PORT``).
        concurrency: Workers; by default as many as there is room for.
        num_cpus, num_gpus: Of each worker; fractions share a GPU.

    Raises:
        ConfigError: If Ray is not installed, or a number is impossible.
    """

    address: str = LOCAL
    concurrency: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        import_ray()
        if (self.concurrency is not None and self.concurrency < 1) or self.num_cpus <= 0 or self.num_gpus < 0:
            raise ConfigError(
                f"--concurrency {self.concurrency}, --num-cpus {self.num_cpus}, --num-gpus {self.num_gpus}",
                fix="give at least one worker, and each more than 0 CPUs",
            )


def import_ray() -> Any:
    """The package, with `ray.data`.

    Raises:
        ConfigError: If it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of how Ray Data itself starts its actors
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without a GPU sees none
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray", fix="pip install 'mmrep[ray]'") from error
    return ray


def map_shards(make: Callable[[], Worker], names: Sequence[str], settings: RaySettings) -> Iterator[tuple[str, Any]]:
    """Do every shard on some worker.

    Args:
        make: Makes a worker; called once in each actor. Importable there by name, its arguments picklable.
        names: Of the shards.
        settings: Where and how.

    Yields:
        A shard's name and what its worker gave, as they are finished.

    Raises:
        MmrepError: When the others are done: what a shard's worker raised.
        DataError: If workers die again and again.
    """
    if not names:
        return
    ray, failed = import_ray(), []
    with ray_session(settings.address):
        try:
            for row in _dataset(ray, make, names, settings).iter_rows():
                if not row["error"]:
                    yield row["name"], json.loads(row["result"])
                    continue
                failed.append(json.loads(row["error"]))
                if len(failed) >= MOST_FAILED:
                    break
        except ray.exceptions.RayError as error:
            raise DataError(
                f"a Ray worker died {MOST_RETRIES} times ({type(error).__name__})",
                fix="if memory ran out, give more --num-cpus to each; run the same again: finished shards are kept",
            ) from None
    if failed:
        raise _failure(failed, len(names))


@contextmanager
def ray_session(address: str, num_cpus: int | None = None) -> Iterator[None]:
    """Ray, started or joined, and left afterwards; one that this process has started before is used as it is.

    A local one has a token of its own in place of one below the home directory, no dashboard, and sends no statistics.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    _check_reachable(address)
    local = {"include_dashboard": False, "num_cpus": num_cpus} if address == LOCAL else {}
    with _own_token(address == LOCAL):
        try:
            with _own_signals(), _quiet():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"no Ray at '{address}' ({reason[:200]})", fix="give --ray-address local") from None
        try:
            yield
        finally:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes to find what is not there.

    Raises:
        ConfigError: If nobody listens at ``HOST:PORT``.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_REACH).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray at '{address}' ({error})", fix="start a cluster, or --ray-address local") from None


def _dataset(ray: Any, make: Callable[[], Worker], names: Sequence[str], settings: RaySettings) -> Any:
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs tracebacks of what is raised here
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.actor_task_retry_on_errors = [OSError]
    pool = ray.data.ActorPoolStrategy(size=_room(ray, settings, len(names)))
    with warnings.catch_warnings():
        # Ray 2.60 deprecates the only way to bound retries, and names no other.
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        return ray.data.from_items(
            [{"name": name} for name in names], override_num_blocks=min(len(names), MOST_BLOCKS)
        ).map_batches(
            type("ShardActor", (_ShardActor,), {"make": staticmethod(make)}),
            batch_size=1,
            batch_format="numpy",
            compute=pool,
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus or None,
            max_restarts=MOST_RETRIES,
            max_task_retries=MOST_RETRIES,
        )


def _room(ray: Any, settings: RaySettings, shards: int) -> int:
    """How many workers there can be; none would wait for ever.

    Raises:
        ConfigError: If there is no room for one.
    """
    there = ray.cluster_resources()
    room = int(there.get("CPU", 0) / settings.num_cpus)
    if settings.num_gpus:
        room = min(room, int(there.get("GPU", 0) / settings.num_gpus))
    if room < 1:
        raise ConfigError(
            f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, a worker needs "
            f"{settings.num_cpus:g} and {settings.num_gpus:g}",
            fix="give smaller --num-cpus and --num-gpus",
        )
    return min(room, shards, settings.concurrency or room)


class _ShardActor:
    """What Ray runs: makes its worker at the first shard, so that what fails there is told like any other error."""

    make: Callable[[], Worker]

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()

    @cached_property
    def worker(self) -> Worker:
        return self.make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"name": [], "result": [], "error": []}
        for name in map(str, batch["name"]):
            result, error = self._do(name)
            for key, value in (("name", name), ("result", result), ("error", error)):
                found[key].append(value)
        return found

    def _do(self, name: str) -> tuple[str, str]:
        try:
            return json.dumps(self.worker(name)), ""
        except OSError as error:
            self.tries[name] += 1
            if self.tries[name] <= MOST_RETRIES:  # a file system may be away for a moment
                time.sleep(self.tries[name])
                raise  # so that Ray tries it again
            told: dict[str, Any] = {
                "kind": "",
                "what": f"cannot be read or written ({error})",
                "where": name,
                "fix": None,
            }
        except MmrepError as error:
            told = {"kind": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
        except Exception as error:
            told = {"kind": "", "what": f"{type(error).__name__}: {error}".splitlines()[0], "where": name, "fix": None}
            told["traceback"] = traceback.format_exc()
        return "", json.dumps(told, default=str)


def _failure(failed: Sequence[dict[str, Any]], shards: int) -> MmrepError:
    first = failed[0]
    kind = getattr(errors, first["kind"], DataError) if first["kind"] else DataError
    more = f"{len(failed)} of {shards} shards failed, the first: " if len(failed) > 1 else ""
    error: MmrepError = kind(more + first["what"], where=first["where"], fix=first["fix"])
    if "traceback" in first:
        error.add_note(first["traceback"])  # seen under --debug
    return error


@contextmanager
def _own_token(wanted: bool) -> Iterator[None]:
    """A token for the time of a local Ray; without one, Ray writes one below the home directory."""
    if not wanted or "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN"]


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which `ray.init` replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of Ray's libraries on stderr while it starts: they tell of their own log level. What fails is raised."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
