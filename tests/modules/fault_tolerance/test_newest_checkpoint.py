"""What `--resume auto` goes on from: the newest checkpoint that is whole."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from mmrep.cli.resume import newest_intact
from mmrep.errors import CheckpointError
from tests.launched import at
from tests.modules.fault_tolerance.running import fit, write_config


@pytest.fixture
def checkpoints(alone: Path, tmp_path: Path) -> Path:
    """Of steps 5, 6 and 9, their times in the wrong order."""
    content = torch.load(alone / "runs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    for age, step in enumerate((9, 6, 5)):
        torch.save({**content, "global_step": step}, tmp_path / f"step={step}.ckpt")
        os.utime(tmp_path / f"step={step}.ckpt", (1e9 + age, 1e9 + age))
    return tmp_path


def test_progress_decides_and_not_the_time(checkpoints: Path) -> None:
    assert newest_intact(checkpoints) == checkpoints / "step=9.ckpt"


def test_damaged_files_are_passed_over_with_a_line(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nine, six = checkpoints / "step=9.ckpt", checkpoints / "step=6.ckpt"
    whole = bytearray(nine.read_bytes())
    whole[len(whole) // 2] ^= 1  # a bit of a tensor
    nine.write_bytes(whole)
    six.write_bytes(six.read_bytes()[:-100])
    (checkpoints / "empty.ckpt").touch()
    torch.save({"state_dict": {}}, checkpoints / "foreign.ckpt")
    content = torch.load(checkpoints / "step=5.ckpt", weights_only=True)
    torch.save({n: v for n, v in content.items() if n != "optimizer_states"}, checkpoints / "weights.ckpt")
    before = {path: path.read_bytes() for path in checkpoints.iterdir()}
    assert newest_intact(checkpoints) == checkpoints / "step=5.ckpt"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("mmrep: warning: passed over, ") for line in lines), lines
    for name in ("step=9", "step=6", "empty", "foreign", "weights"):
        assert sum(f"{name}.ckpt]" in line for line in lines) == 1, lines
    (checkpoints / "step=5.ckpt").write_bytes(b"")
    before[checkpoints / "step=5.ckpt"] = b""
    with pytest.raises(CheckpointError, match="none of the 6 checkpoints is whole"):
        newest_intact(checkpoints)
    assert {path: path.read_bytes() for path in checkpoints.iterdir()} == before


def test_any_flipped_bit_or_cut_is_noticed(checkpoints: Path) -> None:
    """Or changes nothing that is read: the padding between the parts of the file."""
    path, rng = checkpoints / "step=9.ckpt", random.Random(0)
    whole = path.read_bytes()
    expected = torch.load(path, weights_only=True)["state_dict"]
    for number in range(60):
        place = rng.randrange(len(whole))
        broken = bytearray(whole)
        broken[place] ^= 1 << rng.randrange(8)
        path.write_bytes(broken if number % 3 else whole[:place])
        if newest_intact(checkpoints) == path:
            found = torch.load(path, weights_only=True)["state_dict"]
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_without_any_checkpoint_the_run_begins_and_without_a_whole_one_it_does_not(
    tiny_shards: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, tiny_shards, trainer__max_epochs=1)
    assert fit(tmp_path, "--resume", "auto", world=1).codes == [0]  # what a scheduler starts first, and again
    model = tmp_path / "runs" / "run" / "model"
    assert fit(tmp_path, "--resume", "auto", world=1).codes == [0] and model.exists()  # nothing is left to train
    assert not model.with_name("model.before-resume-1").exists()
    longer = ("--resume", "auto", "--trainer.max_epochs", "2")
    assert fit(tmp_path, *longer, world=1, before=[at("start", 7, signal.SIGTERM)]).codes == [0]
    assert not model.exists() and model.with_name("model.before-resume-1").exists()
    for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir():
        path.write_bytes(b"broken")
    ranks = fit(tmp_path, "--resume", "auto", world=1)
    assert ranks.codes == [2] and "checkpoints is whole" in ranks.errors(0)[0]
