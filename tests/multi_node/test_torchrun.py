"""torchrun itself on two hosts, as the page says it, with a rank that dies and is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.multi_node.hosts import Host, two_hosts
from tests.multi_node.record import read_keys
from tests.multi_node.test_two_hosts import alone, config, difference, words

__all__ = ["alone", "config"]  # fixtures
SECONDS = 240
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_on_two_hosts_starts_again_after_a_death(rank: int, config: Path, alone: Path, tmp_path: Path) -> None:
    die = f"{{class_path: tests.multi_node.record.Die, init_args: {{step: 4, rank: {rank}}}}}"
    fit = words(config, tmp_path, "--resume", "auto", "--trainer.callbacks+", die)
    with two_hosts() as hosts:
        outputs = [tmp_path / f"host{node}.txt" for node in (0, 1)]
        processes = [_torchrun(host, node, hosts, fit, outputs[node]) for node, host in enumerate(hosts)]
        try:
            codes = [process.wait(timeout=SECONDS) for process in processes]
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its workers too
    assert codes == [0, 0], [output.read_text()[-4000:] for output in outputs]
    keys = read_keys(alone, 1)
    assert read_keys(tmp_path, 2) == [*keys[:5], *keys[3:]]
    assert difference(tmp_path, alone) < 1e-6


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint_and_no_process(config: Path, tmp_path: Path) -> None:
    """It sends it to the whole group of each rank, loader workers too."""
    fit = words(config, tmp_path, "--data.num_workers", "2", "--trainer.max_epochs", "2000")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    seen, output, until = tmp_path / "rank0.jsonl", tmp_path / "said.txt", time.monotonic() + SECONDS
    process = subprocess.Popen(
        [*launcher, "-m", "mmrep", *fit],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=output.open("wb"),
        stderr=subprocess.STDOUT,
    )
    while not seen.exists() or len(seen.read_text().splitlines()) < 8:
        assert process.poll() is None and time.monotonic() < until, output.read_text()
        time.sleep(0.2)
    started = descendants(process.pid)
    assert len(started) >= 2 + 4
    process.terminate()
    process.wait(60)
    said = output.read_text()
    assert "mmrep: stopped after step" in said and "DataLoader worker" not in said, said
    assert said.count("stops after this step") == 2
    assert (tmp_path / "runs" / "run" / "checkpoints" / "stopped.ckpt").exists()
    time.sleep(1)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return [*children, *(each for child in children for each in descendants(child))]


def _torchrun(host: Host, node: int, hosts: Sequence[Host], fit: list[str], output: Path) -> subprocess.Popen[bytes]:
    """torchrun on one host. Both have the same name here, so which of them has the rendezvous must be said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:29400", "--rdzv-id", "test"]
    here = ["--rdzv-conf", f"is_host={int(node == 0)}", "--local-addr", host.address, "--max-restarts", "2"]
    return subprocess.Popen(
        host.command([*launcher, *meeting, *here, "-m", "mmrep", *fit]),
        cwd=ROOT,
        env={
            **os.environ,
            "GLOO_SOCKET_IFNAME": host.device,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
        stdout=output.open("wb"),
        start_new_session=True,
        stderr=subprocess.STDOUT,
    )
