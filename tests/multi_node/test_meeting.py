"""Where processes of a launch wait for each other: one that cannot start, one that is late, one that is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mmrep.cli.launch import Launch
from mmrep.cli.meeting import Meeting
from mmrep.modules.fault_tolerance.preemption import StopSignals
from tests.multi_node.hosts import Host, Process, wait


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """This machine, with a port for the meeting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    here = Host("127.0.0.1", "lo", None)
    yield here
    for process in here.processes:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)


def meet(
    host: Host, folder: Path, ranks: Sequence[Callable[[], object] | None], world: int, seconds: Sequence[float] = ()
) -> list[Process]:
    """Processes that do something and then wait for the others; each prints how that ends. None is not started."""

    def run(rank: int, before: Callable[[], object]) -> None:
        signals = StopSignals()
        signals.listen()
        print("begins", flush=True)
        try:
            with Meeting(Launch("torchrun", rank, 1, world, False), lambda: signals.received is not None) as meeting:
                before()
                meeting.all_ready(seconds[rank] if seconds else 60)
            print("all ready", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)

    return [
        host.fork(lambda rank=rank, before=before: run(rank, before), folder / f"rank{rank}.txt", {})  # type: ignore[misc]
        for rank, before in enumerate(ranks)
        if before is not None
    ]


def nothing() -> None:
    """A process that has nothing to find out."""


def fail() -> None:
    raise FileNotFoundError("no index.json")


def texts(processes: list[Process], seconds: float = 15) -> list[str]:
    """What the processes printed, once all have ended."""
    assert set(wait(processes, seconds)) == {0}
    return [process.output.read_text() for process in processes]


def test_all_ready(host: Host, tmp_path: Path) -> None:
    said = texts(meet(host, tmp_path, [nothing, lambda: time.sleep(1), nothing], 3))
    assert all("all ready" in text for text in said)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_late_process_hears_too_that_one_cannot_start(failing: int, host: Host, tmp_path: Path) -> None:
    """It came to a store that was gone with rank 0, and waited for it."""
    others = [nothing, nothing]
    others[failing] = fail
    began = time.monotonic()
    said = texts(meet(host, tmp_path, [*others, lambda: time.sleep(4)], 3))
    assert time.monotonic() - began < 12
    assert said[failing].endswith("FileNotFoundError no index.json\n")
    for rank in {0, 1, 2} - {failing}:
        assert f"StartError rank {failing} cannot start: FileNotFoundError: no index.json" in said[rank]


def test_nobody_starts_with_one_that_has_waited_too_long(host: Host, tmp_path: Path) -> None:
    """Its own word of being ready is still there when the last one comes."""
    said = texts(meet(host, tmp_path, [nothing, nothing, lambda: time.sleep(3)], 3, [60, 1, 60]))
    assert all("StartError 2 of 3 processes started within 1 s" in text for text in said), said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_waiting_for_a_process_that_does_not_come(
    rank: int, number: int, host: Host, tmp_path: Path
) -> None:
    """Rank 0 waits at the store for the other, rank 1 for the store."""
    processes = meet(host, tmp_path, [nothing if each == rank else None for each in range(2)], 2)
    time.sleep(1)
    assert processes[0].output.read_text() == "begins\n"
    os.kill(processes[0].pid, number)
    (said,) = texts(processes)
    assert "PreemptedError stopped before the first step; the same command with --resume auto goes on" in said


@pytest.mark.slow
def test_a_signal_to_one_process_ends_the_waiting_of_all(host: Host, tmp_path: Path) -> None:
    processes = meet(host, tmp_path, [nothing, nothing, None], 3)
    time.sleep(1.5)
    os.kill(processes[1].pid, signal.SIGTERM)
    began = time.monotonic()
    with pytest.raises(TimeoutError):  # rank 0 stays for the third, which may come late
        wait(processes, 2)
    assert "PreemptedError" in processes[1].output.read_text()
    os.kill(processes[0].pid, signal.SIGTERM)  # unless it is told too
    assert all("PreemptedError" in text for text in texts(processes)) and time.monotonic() - began < 10
