"""Disks that are full, read-only or in the way: no earlier checkpoint is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mmrep.cli.resume import newest_intact
from mmrep.errors import CheckpointError
from mmrep.files import replacing
from mmrep.modules.fault_tolerance.checkpoint_io import DurableCheckpointIO
from mmrep.modules.monitoring.metrics_file import MetricsFile
from tests.launched import Recorder, calling
from tests.modules.fault_tolerance.running import assert_same, fill, fit, small_disk, weights, write_config


def test_a_full_disk_costs_no_earlier_checkpoint(whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """Full from step 6 to 11, on two ranks: the training goes on, with a line for each checkpoint that is missing."""
    disk = tmp_path / "disk"
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1, checkpoint__every_n_train_steps=1, runs=str(disk))
    small_disk(disk)

    def moment(name: str, step: int) -> None:
        if name == "start" and step == 6:
            fill(disk)
        if name == "start" and 6 <= step <= 12:
            path = newest_intact(disk / "run" / "checkpoints")
            assert path is not None
        if name == "start" and step == 12:
            (disk / "filler").unlink()

    def prepare() -> None:
        Recorder.moment = staticmethod(moment)

    try:
        ranks = fit(tmp_path, before=[prepare])
        assert ranks.codes == [0, 0], ranks.text()
        warned = [line for line in ranks.text().splitlines() if "no checkpoint at step" in line]
        assert {int(line.split("at step ")[1].split(":")[0]) for line in warned} == set(range(7, 13)), ranks.text()
        assert all("No space left on device" in line for line in warned)
        left = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
        assert left == ["epoch=2-step=18.ckpt", "last.ckpt"]  # what was spared is removed when there is a newer one
        shutil.copytree(disk, tmp_path / "runs")
        assert_same(tmp_path, whole)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_at_the_end_is_an_error(alone: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """SIGTERM on a full disk: exit code 2, and the checkpoint before is there to go on from."""
    disk = tmp_path / "disk"
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1, checkpoint__every_n_train_steps=1, runs=str(disk))
    small_disk(disk)

    def stop() -> None:
        fill(disk)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        ranks = fit(tmp_path, world=1, before=[calling("start", 6, stop)])
        assert ranks.codes == [2], ranks.text()
        (line,) = ranks.errors(0)
        assert "the last checkpoint could not be written: No space left on device" in line
        assert newest_intact(disk / "run" / "checkpoints") is not None
        (disk / "filler").unlink()
        ranks = fit(tmp_path, "--resume", "auto", world=1)
        assert ranks.codes == [0], ranks.text()
        shutil.copytree(disk, tmp_path / "runs")
        assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(tmp_path).items())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_where_no_checkpoint_can_be_written_no_run_starts(tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards)
    (tmp_path / "file").write_text("")
    for option in ("--checkpoint.dirpath", "--runs"):
        ranks = fit(tmp_path, option, str(tmp_path / "file"), world=1)
        assert ranks.codes == [2] and len(ranks.errors(0)) == 1 and not (tmp_path / "seen").exists(), ranks.text()


def test_a_file_system_that_is_read_only_starts_no_run(tiny_shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    write_config(tmp_path, tiny_shards, runs=str(disk))
    small_disk(disk)
    try:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        ranks = fit(tmp_path, world=1)
        assert ranks.codes == [2] and "checkpoints cannot be written" in ranks.errors(0)[0], ranks.text()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failed_write_spares_what_it_was_to_replace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, blocked = tmp_path / "a.ckpt", tmp_path / "b.ckpt", tmp_path / "file" / "c.ckpt"
    (tmp_path / "file").write_text("in a folder's place")
    checkpoints = DurableCheckpointIO()
    checkpoints.save_checkpoint({"global_step": 1}, old)
    checkpoints.save_checkpoint({"global_step": 2}, blocked)
    checkpoints.remove_checkpoint(old)
    assert old.exists() and "no checkpoint at step 2" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"could not be written.*the newest one is .*a\.ckpt"):
        checkpoints.check()
    checkpoints.save_checkpoint({"global_step": 3}, new)
    assert new.exists() and not old.exists()
    checkpoints.check()
    with pytest.raises(Exception, match="pickle"):  # no fault of the disk
        checkpoints.save_checkpoint({"global_step": 4, "function": lambda: 0}, new)
    assert torch.load(new, weights_only=True) == {"global_step": 3}


def test_rows_of_metrics_that_found_no_room_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    small_disk(disk)
    try:
        logger = MetricsFile(disk, name="run", version="")
        for step, name in enumerate(("a", "b", "a", "c")):
            if step == 1:
                fill(disk)
            if step == 3:
                (disk / "filler").unlink()
            logger.log_metrics({name: step}, step)
            logger.save()
        warned = capsys.readouterr().err.splitlines()
        assert len(warned) == 1 and "metrics cannot be written (No space left on device)" in warned[0]
        rows = (disk / "run" / "metrics.csv").read_text().splitlines()
        assert rows == ["a,b,c,step", "0,,,0", ",1,,1", "2,,,2", ",,3,3"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("replace"), replace(self, to))[1])
    with replacing(tmp_path / "file", sync=True) as part:
        part.write_text("content")
    assert done == ["sync", "replace", "sync"]
