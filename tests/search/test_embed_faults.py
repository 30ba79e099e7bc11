"""An embedding job that is killed at any moment, stopped, or shared anew ends with the same bytes."""

from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmrep.cli import main
from mmrep.cli.embed import run
from mmrep.search import EmbeddingJob
from mmrep.search.row_files import FORMATS, ShardRows
from tests.full_disk import errno_within
from tests.killed import ended, forked
from tests.modules.fault_tolerance.running import fill, small_disk
from tests.search.conftest import embed, small
from tests.tiny import file_bytes


def words(model: Path, shards: Path, out: Path, *more: str) -> list[str]:
    return [
        *("embed", "--checkpoint", str(model), "--data", str(shards), "--out", str(out)),
        *("--batch-size", "9", "--device", "cpu", *more),
    ]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small().save_pretrained(folder := tmp_path_factory.mktemp("stored") / "model") or folder


def without_parts(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in file_bytes(folder).items() if ".part" not in name}


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_killed_at_random_moments(file_format: str, stored: Path, tiny_shards: Path, tmp_path: Path) -> None:
    command = words(stored, tiny_shards, tmp_path / "out", "--format", file_format)
    embed(small(), tiny_shards, tmp_path / "expected", file_format=file_format)
    start = time.monotonic()
    embed(small(), tiny_shards, tmp_path / "timed", file_format=file_format)
    took, rng = time.monotonic() - start, random.Random(7)
    codes = [
        ended(forked(lambda: run(command), tmp_path / "log"), rng.uniform(0, took), signal.SIGKILL) for _ in range(8)
    ]
    assert -signal.SIGKILL in codes and set(codes) <= {0, -signal.SIGKILL}
    assert run(command) == 0
    assert without_parts(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_sigterm_ends_it_at_once_with_a_message(stored: Path, tiny_shards: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def slowly() -> int:
        EmbeddingJob._write = lambda *_: time.sleep(60)  # type: ignore[method-assign,assignment]  # only in the fork
        return run(words(stored, tiny_shards, out))

    process = forked(slowly, log)
    while not (out / "model" / "config.json").exists():
        time.sleep(0.01)
    start = time.monotonic()
    assert ended(process, 0.5, signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 10
    assert log.read_text() == "mmrep embed: stopped by SIGTERM; finished shards are kept, the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "only while it runs"
    assert run(words(stored, tiny_shards, out)) == 0


def test_what_a_dead_process_left_falls_to_all_of_another_number(tmp_path: Path, tiny_shards: Path) -> None:
    """Every number of processes deals the shards in another order."""
    from mmrep.data.index import Shard
    from mmrep.search.embed import _share

    shards = [Shard(f"train-{number:06d}.tar", 1, "", 1, {}) for number in range(400)]
    for before, after in ((4, 2), (4, 8), (8, 4), (16, 8)):
        parts = [_share(shards, worker, before) for worker in range(before)]
        assert sorted(shard.name for part in parts for shard in part) == [shard.name for shard in shards]
        left = {shard.name for shard in parts[1]}
        again = [sum(shard.name in left for shard in _share(shards, worker, after)) for worker in range(after)]
        assert sum(again) == len(left) == 400 // before
        assert min(again) > 0 and max(again) < 0.8 * len(left)


def test_a_restart_with_another_number_of_processes(tiny_shards: Path, tmp_path: Path) -> None:
    embed(small(), tiny_shards, tmp_path / "expected")
    embed(small(), tiny_shards, tmp_path / "out", worker=0, workers=3)  # the others are dead
    jobs = [embed(small(), tiny_shards, tmp_path / "out", worker=worker, workers=2) for worker in range(2)]
    assert sum(job.kept for job, _ in jobs) == 2 and sum(len(job.pending) for job, _ in jobs) == 3
    assert jobs[0][1] is None and jobs[1][1] is not None
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_ranks_of_torchrun_say_their_share(
    stored: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert run(words(stored, tiny_shards, tmp_path / "out")) == 0
        found = capsys.readouterr()
        assert f"share {rank} of 2 (RANK), on cpu" in found.err
        assert ("complete: 88 samples in 5 shards" in found.out) == bool(rank)
    embed(small(), tiny_shards, tmp_path / "expected")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


@pytest.mark.slow
def test_torchrun_starts_it(stored: Path, tiny_shards: Path, tmp_path: Path) -> None:
    command = words(stored, tiny_shards, tmp_path / "out")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mmrep"]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "share 0 of 2 (RANK), on cpu" in done.stderr and "share 1 of 2 (RANK), on cpu" in done.stderr
    assert "complete: 88 samples in 5 shards" in done.stdout
    embed(small(), tiny_shards, tmp_path / "expected")
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_a_full_disk_is_told_in_one_line(
    file_format: str, stored: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    command = words(stored, tiny_shards, disk / "out", "--format", file_format)
    small_disk(disk)
    try:
        assert main([*command, "--num-shards", "99", "--shard-index", "98"]) == 0, "the model is there, and no rows"
        fill(disk)
        (disk / "filler").open("r+b").truncate((disk / "filler").stat().st_size - (3 << 12))
        capsys.readouterr()
        assert main(command) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
        assert "cannot be read or written" in line and "No space left on device" in line
        (disk / "filler").unlink()
        assert main(command) == 0
        embed(small(), tiny_shards, disk / "expected", file_format=file_format)
        assert without_parts(disk / "out") == file_bytes(disk / "expected")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
@pytest.mark.parametrize("rows", [125, 2000])
def test_no_shard_is_finished_that_a_full_disk_cut(rows: int, file_format: str, tmp_path: Path) -> None:
    """Neither by its last bytes, which do not fill a buffer, nor by many."""
    values, there, contents = np.ones((rows, 8), np.float32), np.ones(rows, bool), np.zeros(rows, np.int64)
    shard = ShardRows(["0"] * rows, list(range(rows)), {"m": values}, {"m": there}, {"m": contents})
    rows_format = FORMATS[file_format]
    assert errno_within(4096, lambda: rows_format.write(tmp_path / "rows", shard), tmp_path / "log") == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    rows_format.write(tmp_path / "rows", shard)
    ((numbers, found, _),) = rows_format.tiles(tmp_path / "rows", "m", rows, 8, rows)
    assert len(numbers) == rows and np.array_equal(found, values)
