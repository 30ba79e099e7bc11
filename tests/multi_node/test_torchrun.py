"""torchrun itself on two hosts, as the page says it, with a rank that dies and is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
