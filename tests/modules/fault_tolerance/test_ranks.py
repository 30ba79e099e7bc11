"""A rank that fails, dies, hangs or is silent ends the others with a line that names it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmrep.ops import gather
from tests.launched import at, calling, launch
from tests.modules.fault_tolerance.running import both, fit, impatient, write_config


def test_an_error_of_one_rank_is_told_by_the_others(tiny_shards: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no such colour")

    write_config(tmp_path, tiny_shards)
    ranks = fit(tmp_path, before=[impatient, both(impatient, calling("start", 5, fail))])
    assert ranks.codes == [2, 1], ranks.text()
    assert "mmrep: error: rank 1 failed (ValueError: no such colour); the same command" in ranks.errors(0)[0]


def test_a_killed_rank_is_named(tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards)
    begun = time.monotonic()
    ranks = fit(tmp_path, before=[None, at("gradients", 5)])
    assert ranks.codes == [2, -signal.SIGKILL] and time.monotonic() - begun < 60
    assert f"rank 1 (process {ranks.processes[1].pid} on " in ranks.errors(0)[0] and len(ranks.errors(0)) == 1


@pytest.mark.slow
def test_a_machine_that_is_silent_ends_the_others_although_the_collective_waits(
    tiny_shards: Path, tmp_path: Path
) -> None:
    """As NCCL has it: no connection closes. The whole process stands still."""
    write_config(tmp_path, tiny_shards)
    for victim in (1, 0):
        before = [impatient, impatient]
        before[victim] = both(impatient, at("start", 5, signal.SIGSTOP))
        arguments = ["fit", "--config", str(tmp_path / "config.yaml"), "--dead_after", "4", "--overwrite"]
        ranks = launch(arguments, tmp_path / "logs", 2, before)
        other = 1 - victim
        ranks.processes[other].join(60)
        assert ranks.processes[other].exitcode == 2, ranks.text(other)
        (line,) = ranks.errors(other)
        assert (f"rank {victim} " if victim else "does not answer") in line or f"rank {victim} " in line
        ranks.processes[victim].kill()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_ends_too(tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards)
    hang = both(impatient, calling("start", 5, lambda: time.sleep(300)))
    ranks = fit(tmp_path, "--hang_after", "5", before=[impatient, hang], timeout=60)
    assert ranks.codes == [2, 2], ranks.text()
    assert "rank 1 is stuck: alive, but not heard of in a collective for 5 s" in ranks.errors(0)[0]
    assert len(ranks.errors(1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_processes_that_lightning_starts(victim: str, whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """``--trainer.devices 2`` in a shell: SIGTERM to the first process stops both; SIGKILL of the second ends the first."""
    write_config(tmp_path, tiny_shards, trainer__devices=2, trainer__max_epochs=2000, trainer__strategy="ddp")
    words = ["fit", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen([sys.executable, "-m", "mmrep", *words], stdout=log, stderr=log, env=environment)
        until = time.monotonic() + 240
        while not (tmp_path / "seen" / "rank1.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.5)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        second = next(int(pid) for pid in children if "mmrep" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(first.pid if victim == "first" else second, signal.SIGTERM if victim == "first" else signal.SIGKILL)
        code = first.wait(60)
    text = (tmp_path / "log").read_text()
    assert code == (0 if victim == "first" else 2), text
    assert ("mmrep: stopped after step" if victim == "first" else "was killed by SIGKILL; the same command") in text, (
        text
    )
    until = time.monotonic() + 30
    while Path(f"/proc/{second}").exists() and time.monotonic() < until:
        time.sleep(0.5)
    assert not Path(f"/proc/{second}").exists()


@pytest.mark.parametrize(
    ("message", "of_others"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4711", True),
        (
            "[..\\third_party\\gloo/gloo/transport/tcp/pair.cc:5] Read error [10.0.0.2]:4: Connection reset by peer",
            True,
        ),
        ("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", True),
        ("[/gloo/transport/tcp/pair.cc:534] Application timeout caused pair closure", True),
        ("NCCL communicator was aborted on rank 1.", True),
        ("DataLoader timed out after 120 seconds", False),
        ("DataLoader worker (pid 4711) is killed by signal: Killed.", False),
        ("no file /data/timeout/NCCL.tar", False),
        ("[Errno 32] Broken pipe", False),
        ("[/pytorch/third_party/gloo/gloo/allreduce.cc:12] Received data size doesn't match expected size", False),
    ],
)
def test_an_error_of_a_collective_is_told_from_those_of_the_rank_itself(
    message: str, of_others: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "world_size", lambda: 2)
    assert gather.is_of_other_ranks(RuntimeError(message)) == of_others
    assert not gather.is_of_other_ranks(OSError(message))
