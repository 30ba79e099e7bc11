"""Faults of a run of weeks: what they cost, and that nothing hangs. See docs/faults.md."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmrep.cli.resume import newest_intact
from mmrep.errors import CheckpointError
from mmrep.evaluation.curves import read_curves
from mmrep.fault_tolerance import watchdog
from mmrep.fault_tolerance.checkpoint_io import DurableCheckpointIO
from mmrep.files import replacing
from mmrep.monitoring.metrics_file import MetricsFile
from tests.launched import Recorder, at, calling, launch, read

EPOCHS, STEPS = 3, 18
ENCODERS = {
    "image": {"class_path": "mmrep.encoders.ConvImageEncoder", "init_args": {"image_size": 16, "width": 8}},
    "text": {"class_path": "mmrep.encoders.NgramTextEncoder", "init_args": {"width": 16, "buckets": 512}},
}


def write_config(folder: Path, shards: Path, **more: Any) -> Path:
    """A run of two modalities, six steps an epoch, that records what it sees in ``seen`` beside the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = {"class_path": "tests.launched.Recorder", "init_args": {"folder": str(folder / "seen")}}
    config: dict[str, Any] = {
        "model": {
            "class_path": "mmrep.modules.PairwiseCLIP",
            "init_args": {"embed_dim": 8, "lr": 5e-3, "warmup_steps": 2, "encoders": ENCODERS},
        },
        "data": {"path": str(shards), "global_batch_size": 8, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "max_epochs": EPOCHS, "callbacks": [recorder], "num_sanity_val_steps": 0},
        "runs": str(folder / "runs"),
        "name": "run",
    }
    for path, value in more.items():
        part = config
        *sections, last = path.split("__")
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def fit(folder: Path, *options: str, world: int = 2, before: Any = (), timeout: float = 120.0) -> Any:
    """One start of the run, to its end."""
    arguments = ["fit", "--config", str(folder / "config.yaml"), *options]
    ranks = launch(arguments, folder / "logs", world, before)
    ranks.wait(timeout)
    return ranks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / "run" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """The run that nothing stopped, on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder, tiny_shards, trainer__log_every_n_steps=1)
    ranks = fit(folder)
    assert ranks.codes == [0, 0], ranks.text()
    assert len(read(folder / "seen")) == STEPS
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    """The samples of every batch, their order, and all weights are those of the run that nothing stopped."""
    seen, expected = read(folder / "seen"), read(whole / "seen")
    assert seen == expected
    found = weights(folder)
    for name, tensor in weights(whole).items():
        assert torch.equal(found[name], tensor), name
    assert_same_curves(folder, whole)


def assert_same_curves(folder: Path, whole: Path) -> None:
    """Every figure of every step, those of validations too."""
    found, expected = (read_curves(place / "runs" / "run") for place in (folder, whole))
    for name, curve in expected.items():
        if name.startswith(("train/loss", "val/")):
            assert found[name] == curve, name


def newest_step(folder: Path) -> int:
    """Steps of the newest checkpoint, as a resume would find it."""
    path = newest_intact(folder / "runs" / "run" / "checkpoints")
    return -1 if path is None else int(torch.load(path, weights_only=True, mmap=True)["global_step"])


MOMENTS = ("start", "gradients", "end", "writing", "written")


def kill_and_go_on(folder: Path, kills: list[tuple[str, int, tuple[int, ...]]]) -> None:
    """Kill the run at moments of steps, on some of its two ranks; start it again each time; and once to the end."""
    for moment, step, victims in kills:
        before = [at(moment, step) if rank in victims else None for rank in range(2)]
        ranks = fit(folder, "--resume", "auto", before=before)
        assert all(ranks.codes[rank] == -signal.SIGKILL for rank in victims), ranks.text()
        for rank in {0, 1} - set(victims):
            assert ranks.codes[rank] == 2 and len(ranks.errors(rank)) == 1, ranks.text(rank)
            assert "--resume auto" in ranks.errors(rank)[0]
    assert fit(folder, "--resume", "auto").codes == [0, 0]


def test_killed_twice_the_run_ends_as_if_nothing_had_been(whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1, checkpoint__every_n_train_steps=2)
    kill_and_go_on(tmp_path, [("gradients", 5, (1,)), ("writing", 10, (0,))])
    assert_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3])
def test_killed_ten_times_at_random_moments(every: int, whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """SIGKILL of one rank or both, at random steps and moments, the writing of a checkpoint among them."""
    rng = random.Random(every)
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1, checkpoint__every_n_train_steps=every)
    kills = []
    for step in sorted(rng.choices(range(1, STEPS - every), k=10)):
        moment = rng.choice(MOMENTS)
        kills.append((moment, step, (0,) if moment in ("writing", "written") else rng.choice([(0,), (1,), (0, 1)])))
    kill_and_go_on(tmp_path, kills)
    assert_same(tmp_path, whole)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """The run that nothing stopped, of one process."""
    folder = tmp_path_factory.mktemp("alone")
    write_config(folder, tiny_shards, trainer__log_every_n_steps=1)
    assert fit(folder, world=1).codes == [0]
    return folder


@pytest.mark.parametrize(
    ("moment", "step", "number", "times", "stopped"),
    [
        ("start", 7, signal.SIGTERM, 1, 8),
        ("end", 4, signal.SIGUSR1, 1, 5),
        ("gradients", 8, signal.SIGINT, 2, 10),
        ("start", 11, signal.SIGTERM, 1, 12),  # the last step of an epoch: its validation comes when the run goes on
        ("end", 12, signal.SIGTERM, 3, 12),
        ("gradients", 11, signal.SIGTERM, 1, 12),
        ("validation", 12, signal.SIGTERM, 1, 12),
        ("writing", 6, signal.SIGTERM, 1, 7),
    ],
)
def test_a_signal_ends_the_run_with_a_checkpoint_and_exit_code_0(
    moment: str, step: int, number: int, times: int, stopped: int, alone: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1)
    begun = time.monotonic()
    ranks = fit(tmp_path, world=1, before=[at(moment, step, number, times)])
    assert ranks.codes == [0] and time.monotonic() - begun < 60, ranks.text()
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "stopped.ckpt"
    message = (
        f"mmrep: stopped after step {stopped}; checkpoint in {checkpoint}; the same command with --resume auto goes on"
    )
    assert message in ranks.text().splitlines() and "Traceback" not in ranks.text()
    assert newest_step(tmp_path) == stopped
    assert not (tmp_path / "runs" / "run" / "model").exists()  # which says that a run is complete
    ranks = fit(tmp_path, "--resume", "auto", world=1)
    assert ranks.codes == [0], ranks.text()
    assert read(tmp_path / "seen", 1) == read(alone / "seen", 1)
    assert_same_curves(tmp_path, alone)
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize("moment", ["made", "sanity"])
def test_a_signal_before_the_first_step_has_nothing_to_save(moment: str, tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards, trainer__num_sanity_val_steps=2)
    ranks = fit(tmp_path, world=1, before=[at(moment, 0, signal.SIGTERM)])
    assert ranks.codes == [0] and "mmrep: stopped before the first step;" in ranks.text(), ranks.text()
    assert not (tmp_path / "seen").exists() and newest_step(tmp_path) == -1


def test_a_second_ctrl_c_after_a_while_stops_at_once(tiny_shards: Path, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

    write_config(tmp_path, tiny_shards)
    ranks = fit(tmp_path, world=1, before=[calling("start", 3, twice)])
    assert ranks.codes[0] != 0 and "stops now, without a checkpoint" in ranks.text(), ranks.text()
    assert newest_step(tmp_path) == -1


@pytest.mark.parametrize(("moment", "step", "victims"), [("start", 7, (1,)), ("validation", 12, (0, 1))])
def test_a_signal_to_one_rank_or_to_all_stops_all_at_one_step(
    moment: str, step: int, victims: tuple[int, ...], whole: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1)
    ranks = fit(tmp_path, before=[at(moment, step, signal.SIGTERM) if r in victims else None for r in range(2)])
    assert ranks.codes == [0, 0] and "mmrep: stopped after step" in ranks.text(0), ranks.text()
    assert newest_step(tmp_path) == (8 if moment == "start" else 12)
    assert fit(tmp_path, "--resume", "auto").codes == [0, 0]
    assert_same(tmp_path, whole)


def test_stopped_inside_an_accumulated_step_the_run_keeps_its_gradients(tiny_shards: Path, tmp_path: Path) -> None:
    """Two parts a step, and a validation after every third part, half of them inside a step."""
    options = {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 3, "model__init_args__lr": 1e-2}
    for name in ("whole", "stopped"):
        write_config(tmp_path / name, tiny_shards, **options)
    assert fit(tmp_path / "whole", world=1).codes == [0]
    ranks = fit(tmp_path / "stopped", world=1, before=[at("validation", 4, signal.SIGTERM)])
    assert ranks.codes == [0] and newest_step(tmp_path / "stopped") == 4, ranks.text()
    ranks = fit(tmp_path / "stopped", "--resume", "auto", world=1)
    assert ranks.codes == [0], ranks.text()
    assert read(tmp_path / "stopped" / "seen", 1) == read(tmp_path / "whole" / "seen", 1)
    found, expected = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_by_the_clock_and_by_steps_at_once(alone: Path, tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards, checkpoint__every_n_train_steps=4)
    options = ("--checkpoint_minutes", "0.00001", "--checkpoint.train_time_interval", "null")
    ranks = fit(tmp_path, *options, world=1, before=[at("start", 7)])
    assert ranks.codes == [-signal.SIGKILL]
    names = {path.name for path in (tmp_path / "runs" / "run" / "checkpoints").glob("*.ckpt")}
    assert names == {"epoch=0-step=4.ckpt", "last.ckpt", "timed.ckpt"} and newest_step(tmp_path) == 7
    assert fit(tmp_path, "--resume", "auto", world=1).codes == [0]
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(tmp_path).items())


def impatient() -> None:
    """The watch in a tenth of its time."""
    watchdog.PERIOD, watchdog.GRACE, watchdog.WAY_OUT = 0.5, 3.0, 5.0


def both(*functions: Any) -> Any:
    return lambda: [function() for function in functions]


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


def test_a_rank_that_hangs_is_named_and_ends_too(tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards)
    hang = both(impatient, calling("start", 5, lambda: time.sleep(300)))
    ranks = fit(tmp_path, "--hang_after", "5", before=[impatient, hang], timeout=60)
    assert ranks.codes == [2, 2], ranks.text()
    assert "rank 1 is stuck: alive, but not heard of in a collective for 5 s" in ranks.errors(0)[0]
    assert len(ranks.errors(1)) == 1


def small_disk(folder: Path) -> None:
    """A file system of 3 MB."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("no file system can be mounted here")


def fill(folder: Path) -> None:
    """Take all room that is left."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"0" * size)
            except OSError:
                pass


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


# The newest whole checkpoint


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


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_processes_that_lightning_starts(victim: str, whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """``--trainer.devices 2`` in a shell: SIGTERM to the first process stops both; SIGKILL of the second ends the first."""
    write_config(tmp_path, tiny_shards, trainer__devices=2, trainer__max_epochs=2000, trainer__strategy="ddp")
    words = ["fit", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
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
