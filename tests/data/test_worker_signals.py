"""Loader workers end with the process that made them, and by none of the signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch.utils.data._utils as loading
from torch.utils.data import Dataset

from mmrep.data.dataset import ShardLoader
from mmrep.data.worker_signals import SIGNALS
from mmrep.stopping import Stopped, stopped_by_signals


class Naps(Dataset[Any]):
    """Samples that take so many seconds each."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, number: int) -> float:
        time.sleep(self.seconds[number])
        return self.seconds[number]


def loader(*seconds: float, **options: Any) -> ShardLoader:
    return ShardLoader(Naps(*seconds), batch_size=None, num_workers=1, **options)


def send(number: int, pid: int) -> None:
    """From a process that is not the parent."""
    subprocess.run(["kill", f"-{int(number)}", str(pid)], check=True)


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time. One that nobody has waited for yet has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        place = Path(f"/proc/{pid}/stat")
        if not place.exists() or place.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_hangs_ends_by_sigterm_of_its_parent_alone() -> None:
    iterator = loader(0, 60)._get_iterator()
    (worker,) = iterator._workers
    for number in SIGNALS:  # as early as they can come
        send(number, worker.pid)
    assert next(iterator) == 0
    for number in SIGNALS:
        send(number, worker.pid)
    time.sleep(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def test_a_loader_that_is_left_ends_a_worker_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MP_STATUS_CHECK_INTERVAL", 0.3)  # torch's patience, of 5 s
    iterator = loader(0, 60)._get_iterator()
    assert next(iterator) == 0
    pid = iterator._workers[0].pid
    del iterator
    assert gone(pid, 5)


def test_a_worker_ends_after_its_parent_was_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading.worker, "MP_STATUS_CHECK_INTERVAL", 0.3)
    parent = os.fork()
    if not parent:
        iterator = loader(0, 0, 0, 0)._get_iterator()
        (tmp_path / "part").write_text(str(iterator._workers[0].pid))
        (tmp_path / "part").rename(tmp_path / "pid")
        time.sleep(60)
        os._exit(1)
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_work_that_a_signal_to_all_stops_at_once_still_does(number: int, tmp_path: Path) -> None:
    """`mmrep embed`: its handler raises where the work is."""
    parent = os.fork()
    if not parent:
        os.setsid()
        os.dup2(os.open(tmp_path / "said", os.O_CREAT | os.O_WRONLY), 2)
        try:
            with stopped_by_signals():
                for _ in loader(*[0.05] * 600):
                    (tmp_path / "begun").touch()
        except Stopped as stop:
            os._exit(stop.exit_code)
        os._exit(99)
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(parent, number)
    _, status = os.waitpid(parent, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + number and time.monotonic() - began < 3
    assert (tmp_path / "said").read_text() == ""


def test_the_process_itself_and_the_loader_are_left_as_they_were(tmp_path: Path) -> None:
    def seed(worker: int) -> None:
        (tmp_path / f"worker{worker}").touch()

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loading = loader(0, 0, worker_init_fn=seed)
    assert list(loading) == [0, 0] and (tmp_path / "worker0").exists()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked and loading.worker_init_fn is seed
