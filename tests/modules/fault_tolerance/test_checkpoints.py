"""What is left at the end of a run, and what is chosen: nothing of it is lost or replaced by less."""

from __future__ import annotations

import os
import pickle
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

from mmrep.cli import main
from mmrep.cli.resume import newest_intact
from mmrep.errors import CheckpointError
from mmrep.evaluation.curves import read_curves
from mmrep.files import set_aside
from mmrep.modules.callbacks import KNNProbe
from mmrep.modules.fault_tolerance.watchdog import Watchdog
from tests.launched import at, calling, read
from tests.modules.fault_tolerance.running import (
    assert_same,
    both,
    fill,
    fit,
    impatient,
    newest_step,
    small_disk,
    weights,
    write_config,
)


def averaged(folder: Path, shards: Path, **more: Any) -> list[str]:
    """Words that start a short run with averages, in this process."""
    config = yaml.safe_load(write_config(folder, shards, **more).read_text())
    config["trainer"] |= {
        "max_epochs": 2,
        "callbacks": [{"class_path": "mmrep.modules.callbacks.EMA", "init_args": {"decay": 0.9}}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(folder / "config.yaml"), "--trainer.devices", "1", "--resume", "auto"]


def test_a_finished_run_started_again_keeps_its_averages(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, run = averaged(tmp_path, tiny_shards), tmp_path / "runs" / "run"
    assert main(words) == 0
    kept = {path: path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()}
    averages = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    capsys.readouterr()
    for lost in (False, True):  # the second time the run had ended before it wrote its model
        if lost:
            (run / "model").rename(run / "elsewhere")
        assert main(words) == 0
        assert ("nothing was left to train" in capsys.readouterr().out) != lost
        assert {path: path.read_bytes() for path in (run / "model").rglob("*") if path.is_file()} == kept
        assert all(torch.equal(tensor, averages[f"model.{name}"]) for name, tensor in weights(tmp_path).items())


def test_checkpoints_of_weights_alone_are_refused_with_averages(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = averaged(tmp_path, tiny_shards)
    assert main([*words, "--checkpoint.save_weights_only", "true"]) == 2
    assert "weights alone would hold those that are trained" in capsys.readouterr().err
    torch.save({"mmrep_model": {}, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="all of the 1 checkpoints hold weights alone"):
        newest_intact(tmp_path)


@pytest.mark.parametrize("moment", ["start", "validation"])
def test_the_last_validation_of_max_steps_is_made_up_for(moment: str, tiny_shards: Path, tmp_path: Path) -> None:
    """Stopped at the last step, or killed in the validation after it: the best checkpoint is that of the whole run."""
    options = {"trainer__max_steps": 12, "trainer__max_epochs": -1, "checkpoint__monitor": "val/loss"}
    options |= {"trainer__log_every_n_steps": 1, "trainer__val_check_interval": 3}
    for name in ("whole", "stopped"):
        write_config(tmp_path / name, tiny_shards, **options)
    assert fit(tmp_path / "whole", world=1).codes == [0]
    clock = ("--checkpoint_minutes", "0.00001")
    before = at("start", 11, 15) if moment == "start" else at("validation", 12)
    ranks = fit(tmp_path / "stopped", *clock, world=1, before=[before])
    assert ranks.codes == [0 if moment == "start" else -9], ranks.text()
    assert newest_step(tmp_path / "stopped") == 12 and not (tmp_path / "stopped" / "runs" / "run" / "model").exists()
    ranks = fit(tmp_path / "stopped", "--resume", "auto", world=1)
    assert ranks.codes == [0], ranks.text()
    found, expected = (
        torch.load(tmp_path / name / "runs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("stopped", "whole")
    )
    states = [state for of in (found, expected) for name, state in of["callbacks"].items() if "Monitored" in name]
    assert states[0]["best_model_score"] == states[1]["best_model_score"]
    assert found["global_step"] == expected["global_step"] == 12
    assert all(
        torch.equal(tensor, weights(tmp_path / "whole")[n]) for n, tensor in weights(tmp_path / "stopped").items()
    )


def test_no_model_without_weights_on_a_full_disk(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    small_disk(disk)
    try:
        write_config(tmp_path, tiny_shards, runs=str(disk), trainer__max_epochs=1, trainer__devices=1)
        words = ["fit", "--config", str(tmp_path / "config.yaml"), "--resume", "auto"]
        assert main(words) == 0
        (disk / "run" / "model").rename(disk / "run" / "elsewhere")
        fill(disk)
        capsys.readouterr()
        assert main([*words, "--trainer.max_epochs", "2"]) == 2
        assert "the last checkpoint could not be written" in capsys.readouterr().err
        monkeypatch.setattr("mmrep.modules.fault_tolerance.checkpoint_io.DurableCheckpointIO.check", lambda self: None)
        assert main(words) == 2
        assert "the model could not be written" in capsys.readouterr().err
        assert not (disk / "run" / "model").exists()
        (disk / "filler").unlink()
        assert main(words) == 0
        assert load_file(disk / "run" / "model" / "model.safetensors")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    metrics, model = tmp_path / "metrics.csv", tmp_path / "model"
    set_aside(metrics)
    (tmp_path / "metrics.before-resume-2.csv").write_text("earlier")  # the first was removed by hand
    (tmp_path / "metrics.before-resume-10.csv").write_text("later")
    metrics.write_text("new")
    model.mkdir()
    set_aside(metrics)
    set_aside(model)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert found == {
        "metrics.before-resume-2.csv": "earlier",
        "metrics.before-resume-10.csv": "later",
        "metrics.before-resume-11.csv": "new",
    }
    assert (tmp_path / "model.before-resume-1").is_dir() and not model.exists()


def test_an_own_checkpoint_callback_leaves_the_monitors_choice(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": {"filename": "own"}}
    write_config(tmp_path, tiny_shards, trainer__callbacks=[own], trainer__max_epochs=1, trainer__devices=1)
    words = ["fit", "--config", str(tmp_path / "config.yaml"), "--checkpoint.monitor", "val/loss"]
    assert main(words) == 0 and "(best checkpoint)" in capsys.readouterr().out


def test_an_error_of_one_rank_is_told_although_a_checkpoint_is_asked_for(tiny_shards: Path, tmp_path: Path) -> None:
    """A checkpoint is written by all ranks together."""

    def fail() -> None:
        raise ValueError("no such colour")

    write_config(tmp_path, tiny_shards, checkpoint__save_on_exception=True)
    begun = time.monotonic()
    ranks = fit(tmp_path, "--hang_after", "60", before=[impatient, both(impatient, calling("start", 5, fail))])
    assert ranks.codes == [2, 1] and time.monotonic() - begun < 45, ranks.text()
    assert "mmrep: error: rank 1 failed (ValueError: no such colour); the same command" in ranks.errors(0)[0]


@pytest.mark.slow
def test_processes_that_pickle_their_start(tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards, trainer__devices=2, trainer__max_epochs=1, trainer__strategy="ddp_spawn")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    words = [sys.executable, "-m", "mmrep", "fit", "--config", str(tmp_path / "config.yaml")]
    subprocess.run(words, env=environment, check=True, timeout=240)
    assert newest_step(tmp_path) > 0 and all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_a_signal_in_a_callbacks_evaluation_does_not_wait_for_its_end(tiny_shards: Path, tmp_path: Path) -> None:
    """It comes to one of two ranks, in the first of several batches; the evaluation begins anew when the run goes on."""
    probe = {"class_path": "mmrep.modules.callbacks.KNNProbe", "init_args": {"modality": "image", "batch_size": 4}}
    options = {"trainer__log_every_n_steps": 1, "trainer__max_epochs": 2}
    for name in ("whole", "stopped"):
        config = yaml.safe_load(write_config(tmp_path / name, tiny_shards, **options).read_text())
        config["trainer"]["callbacks"].append(probe)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))

    def signalled() -> None:
        evaluate = KNNProbe.evaluate

        def stopped(self: KNNProbe, *arguments: Any) -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            evaluate(self, *arguments)
            raise AssertionError("the evaluation went on to its end")

        KNNProbe.evaluate = stopped  # type: ignore[assignment, method-assign]  # in a process of its own

    assert fit(tmp_path / "whole").codes == [0, 0]
    ranks = fit(tmp_path / "stopped", before=[None, signalled])
    assert ranks.codes == [0, 0] and "mmrep: stopped after step 6" in ranks.text(0), ranks.text()
    assert fit(tmp_path / "stopped", "--resume", "auto").codes == [0, 0]
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    found, expected = (read_curves(tmp_path / name / "runs" / "run") for name in ("stopped", "whole"))
    assert found["eval/knn_image/acc1"] == expected["eval/knn_image/acc1"]


def test_an_accumulated_step_of_two_ranks_goes_on_to_rounding(tiny_shards: Path, tmp_path: Path) -> None:
    """Adam makes steps of any gradient, so that its mean of gradients is compared, after the step that was stopped in."""
    options = {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 3, "trainer__max_steps": 5}
    for name in ("whole", "stopped"):
        write_config(tmp_path / name, tiny_shards, **options, checkpoint__every_n_train_steps=1)
    assert fit(tmp_path / "whole").codes == [0, 0]
    ranks = fit(tmp_path / "stopped", before=[None, at("validation", 4, signal.SIGTERM)])
    assert ranks.codes == [0, 0] and newest_step(tmp_path / "stopped") == 4, ranks.text()
    checkpoints = tmp_path / "stopped" / "runs" / "run" / "checkpoints"
    assert torch.load(checkpoints / "stopped.ckpt", weights_only=True)["mmrep_accumulated_gradients"]
    assert fit(tmp_path / "stopped", "--resume", "auto").codes == [0, 0]
    assert read(tmp_path / "stopped" / "seen") == read(tmp_path / "whole" / "seen")
    last, expected = (
        torch.load(tmp_path / name / "runs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("stopped", "whole")
    )
    assert last["global_step"] == expected["global_step"] == 5
    for number, state in expected["optimizer_states"][0]["state"].items():
        found, wanted = last["optimizer_states"][0]["state"][number]["exp_avg"], state["exp_avg"]
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-7, number


def test_the_watchdog_goes_into_other_processes() -> None:
    again = pickle.loads(pickle.dumps(Watchdog(3.0, 7.0)))
    assert (again.silence, again.timeout) == (3.0, 7.0)
