"""The command as a user types it: a whole run on small shards, and every mistake answered in one line with exit code 2."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

import mmrep
from mmrep.cli import main
from mmrep.cli.run_folder import FirstStep, RunFolder
from mmrep.encoders import ConvImageEncoder
from mmrep.errors import ConfigError
from mmrep.interop.load import CONFIG_KEY
from tests.tiny import file_bytes

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "mmrep.modules.PairwiseCLIP",
        "init_args": {
            "embed_dim": 16,
            "lr": 5e-3,
            "warmup_steps": 2,
            "encoders": {
                "image": {"class_path": "mmrep.encoders.ConvImageEncoder", "init_args": {"image_size": 16, "width": 8}},
                "text": {"class_path": "mmrep.encoders.NgramTextEncoder", "init_args": {"width": 16, "buckets": 512}},
                "audio": {"class_path": "mmrep.encoders.MelAudioEncoder", "init_args": {"seconds": 0.2, "width": 16}},
            },
        },
    },
    "data": {"global_batch_size": 16, "num_workers": 0},
    "trainer": {"accelerator": "cpu", "max_epochs": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A folder with config.yaml, and a run "base" of two epochs."""
    folder = tmp_path_factory.mktemp("home")
    config = {**CONFIG, "data": {**CONFIG["data"], "path": str(tiny_shards)}, "runs": str(folder / "runs")}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "config.yaml"), "--name", "base"]) == 0
    return folder


def fit(home: Path, *options: str, name: str = "other") -> int:
    return main(["fit", "--config", str(home / "config.yaml"), "--name", name, *options])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last error, which must be one line."""
    error = capsys.readouterr().err.strip().splitlines()
    assert error and error[-1].startswith("mmrep: error: ") and len(error) == 1, error
    return error[0]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_config_metrics_checkpoints_and_model(home: Path) -> None:
    run = home / "runs" / "base"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints", "model"}
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["lr"] == 5e-3
    metrics = rows(run / "metrics.csv")
    assert [row for row in metrics if row.get("train/loss")] and [row for row in metrics if row.get("val/loss")]
    assert any(row.get("val/audio+text->image/recall@1") for row in metrics)
    model = mmrep.load(run)
    assert model.encode(text=["a red thing"])["text"].shape == (1, 16)


def test_the_saved_config_runs_again_and_gives_the_same_model(home: Path) -> None:
    run = home / "runs" / "base"
    assert main(["fit", "--config", str(run / "config.yaml"), "--name", "again"]) == 0
    assert list((home / "runs" / "again" / "checkpoints").glob("*.ckpt"))
    one, other = (mmrep.load(home / "runs" / name).state_dict() for name in ("base", "again"))
    assert all(bool((one[key] == other[key]).all()) for key in one)


def test_a_start_option_is_not_part_of_the_run(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run started with --overwrite leaves a config.yaml that does not overwrite it."""
    assert fit(home, "--trainer.max_epochs", "1", name="replaced") == 0
    assert fit(home, "--overwrite", "--trainer.max_epochs", "1", name="replaced") == 0
    saved = home / "runs" / "replaced" / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    assert not content["overwrite"] and not content["resume"] and not content["checkpoint"]["dirpath"]
    capsys.readouterr()
    assert main(["fit", "--config", str(saved)]) == 2
    assert "the run folder exists" in one_line(capsys)
    checkpoint = home / "runs" / "replaced" / "checkpoints" / "last.ckpt"
    for option in (["--resume", "auto"], ["--ckpt_path", str(checkpoint)]):
        assert fit(home, "--overwrite", *option, name="replaced") == 2
        assert "would remove the checkpoint" in one_line(capsys)
    assert checkpoint.exists()


def test_eval_writes_the_json_of_the_design_and_a_picture(
    home: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = home / "result.json", home / "picture.png"
    words = ["eval", "retrieval", "--checkpoint", str(home / "runs" / "base"), "--data", str(tiny_shards)]
    assert main([*words, "--out", str(out), "--picture", str(picture)]) == 0
    assert "audio+text->image" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert set(result) == {"task", "checkpoint", "data", "split", "n", "directions"}
    assert result["task"] == "retrieval" and result["n"] == 20 and len(result["directions"]) == 9
    figures = result["directions"]["text->image"]
    assert set(figures) == {
        *("queries", "candidates", "recall@1", "recall@5", "recall@10", "recall@1_ci95", "mrr", "median_rank"),
        "chance_recall@1",
    }
    assert 0 <= figures["recall@1_ci95"][0] <= figures["recall@1"] <= figures["recall@1_ci95"][1] <= 1
    assert figures["queries"] == 18 and figures["chance_recall@1"] == pytest.approx(1 / 6, abs=0.02)
    from PIL import Image

    assert min(Image.open(picture).size) > 300
    assert main([*words, "--out", str(out)]) == 2
    assert "--overwrite" in one_line(capsys)
    assert main([*words, "--picture", str(picture)]) == 2
    assert "picture.png" in (line := one_line(capsys)) and "--overwrite" in line


def test_a_picture_that_cannot_be_drawn_costs_no_evaluation(
    home: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be known before is refused before; of the rest, the figures are there and the last picture stays."""
    from matplotlib.figure import Figure

    out, picture = tmp_path / "result.json", tmp_path / "picture.png"
    words = ["eval", "retrieval", "--checkpoint", str(home / "runs" / "base"), "--data", str(tiny_shards)]
    words += ["--out", str(out)]
    for wrong, message in (
        (["--picture", str(picture), "--picture-direction", "text->imgae"], "did you mean 'image'"),
        (["--picture", str(tmp_path / "picture.docx")], "no picture is written as '.docx'"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in one_line(capsys) and not out.exists()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.backend_bases", None)
        assert main([*words, "--picture", str(picture)]) == 2
        assert "mmrep[viz]" in one_line(capsys) and not out.exists()
    picture.write_bytes(b"earlier")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main([*words, "--picture", str(picture), "--overwrite"]) == 2
    assert json.loads(out.read_text())["n"] == 20 and picture.read_bytes() == b"earlier"


def test_eval_probe_stands_beside_random_weights_and_raw_input(
    home: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = home / "probe.json"
    words = ["eval", "probe", "--checkpoint", str(home / "runs" / "base"), "--data", str(tiny_shards)]
    assert main([*words, "--modality", "image", "--label", "label", "--out", str(out)]) == 0
    assert "random weights" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert set(result) == {"task", "method", "checkpoint", "data", "modality", "label", "split", "features"}
    assert set(result["features"]) == {"trained", "random weights", "raw input"}
    assert result["features"]["trained"]["accuracy"] > 0.9  # a class is a colour
    assert result["features"]["raw input"]["features"] == 3 * 16 * 16
    assert result["features"]["trained"]["test"] == 17  # 20, of which three have no picture
    assert main([*words, "--modality", "text", "--label", "label"]) == 0
    assert "raw input" not in capsys.readouterr().out
    for method, chosen in (("sgd", "weight_decay"), ("knn", "k")):
        more = ["--modality", "image", "--label", "label", "--method", method, "--out", str(out), "--overwrite"]
        assert main([*words, *more]) == 0 and chosen in capsys.readouterr().out
        found = json.loads(out.read_text())
        assert found["method"] == method and found["features"]["trained"]["accuracy"] > 0.9
    for wrong, message in (
        (["--modality", "img", "--label", "label"], "did you mean 'image'?"),
        (["--modality", "image", "--label", "lable"], "did you mean 'label'?"),
        (["--modality", "image", "--label", "label", "--val-split", "vla"], "did you mean 'val'?"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_test_and_predict_take_a_checkpoint(home: Path) -> None:
    run = home / "runs" / "base"
    common = [
        "--config",
        str(home / "config.yaml"),
        "--name",
        "base",
        "--ckpt_path",
        str(run / "checkpoints" / "last.ckpt"),
    ]
    before = (run / "metrics.csv").read_bytes()
    assert main(["test", *common]) == 0
    assert any(row.get("test/audio+text->image/recall@1") for row in rows(run / "test" / "metrics.csv"))
    assert (run / "metrics.csv").read_bytes() == before
    assert main(["predict", *common]) == 0
    found = np.load(run / "predictions" / "embeddings-rank0.npz", allow_pickle=False)
    assert found["text"].shape == (20, 16) and len(set(found["keys"].tolist())) == 20
    assert int(found["text_present"].sum()) == 18


def test_resume_goes_on_and_keeps_the_earlier_metrics(home: Path) -> None:
    shutil.copytree(home / "runs" / "base", home / "runs" / "longer")
    assert fit(home, "--resume", "auto", "--trainer.max_epochs", "3", name="longer") == 0
    run = home / "runs" / "longer"
    assert {row["epoch"] for row in rows(run / "metrics.csv")} == {"2"}
    assert {row["epoch"] for row in rows(run / "metrics.before-resume-1.csv")} == {"0", "1"}


def test_two_gloo_ranks_train_and_count_each_sample_once(home: Path) -> None:
    once = ["--trainer.max_epochs", "1", "--model.init_args.encoders.audio.init_args.augment", "false"]
    assert fit(home, *once, "--trainer.devices", "2", "--trainer.strategy", "ddp_fork", name="two") == 0
    assert fit(home, *once, name="one") == 0
    two, one = (rows(home / "runs" / name / "metrics.csv")[-1] for name in ("two", "one"))
    # Weights are no measure: AdamW moves a weight by a whole step whatever the size of its gradient, rounding included.
    assert float(two["val/loss"]) == pytest.approx(float(one["val/loss"]), rel=2e-3)
    assert float(two["val/text->image/recall@1"]) == pytest.approx(float(one["val/text->image/recall@1"]), abs=0.12)


def test_wandb_offline_and_tensorboard_by_flag(home: Path) -> None:
    assert fit(home, "--wandb", "--tensorboard", "--trainer.max_epochs", "1", name="logged") == 0
    run = home / "runs" / "logged"
    assert list(run.rglob("events.out.tfevents*")) and list(run.rglob("*.wandb")) and (run / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init_args.lrr", "1"], "unknown key 'lrr'; did you mean 'lr'?"),
        (["--data.pathh", "x"], "did you mean 'path'?"),
        (["--trainer.max_epohcs", "1"], "did you mean 'max_epochs'?"),
        (["--model", "mmrep.modules.PairwiseClip"], "did you mean 'PairwiseCLIP'?"),
        (["--model.init_args.encoders.image", "mmrep.encoders.ConvImagEncoder"], "did you mean 'ConvImageEncoder'?"),
        (["--model.init_args.encoders.image.init_args.widht", "8"], "did you mean 'width'?"),
        (["--model.init_args.lr", "fast"], "fast"),
        (["--data.path", "nowhere"], "no index.json [nowhere]; there is no such folder"),
        (["--data.train_split", "trian"], "no split 'trian'"),
        (["--data.global_batch_size", "999"], "lower data.global_batch_size"),
        (["--model.init_args.encoders.ecg", "mmrep.encoders.FeaturesEncoder"], "no modality 'ecg'"),
        (["--model.init_args.reduction", "median"], "reduction='median'"),
        (["--ckpt_path", "nothing.ckpt"], "no such checkpoint"),
        (["--resume", "yes"], "--resume auto"),
        (["--name", "../outside"], "cannot name a run"),
        (["--data.num_workers", "-1"], "-1 is too small [data.num_workers]; give 0 or more"),
        (["--trainer.val_check_interval", "0"], "0 is too small [trainer.val_check_interval]"),
        (["--trainer.accumulate_grad_batches", "0"], "0 is too small [trainer.accumulate_grad_batches]"),
        (["--trainer.max_time", "nonsense"], "Expected a string in the format DD:HH:MM:SS."),
        (["--trainer.max_steps", "-5"], "`max_steps` must be a non-negative integer or -1"),
        (["--trainer.limit_train_batches", "7.5"], "invalid value 7.5 for limit_train_batches"),
        (["--trainer.strategy", "nope"], "invalid strategy name: `strategy='nope'`"),
        (["--checkpoint.save_top_k", "3"], "No quantity for top_k to track"),
        (["--trainer.devices", "2", "--trainer.val_check_interval", "{seconds: 1}"], "by its own clock [trainer.val_"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    home: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(home, *options) == 2
    assert message in one_line(capsys)
    assert not (home / "runs" / "other").exists() and not (home / "outside").exists()


def test_a_misspelt_key_in_yaml_names_the_nearest(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (home / "config.yaml").read_text()
    for wrong, right in (
        ("warmup_step:", "warmup_steps"),
        ("global_batchsize:", "global_batch_size"),
        ("trainr:", "trainer"),
    ):
        key = {"warmup_step:": "warmup_steps:", "global_batchsize:": "global_batch_size:", "trainr:": "trainer:"}[wrong]
        (home / "bad.yaml").write_text(text.replace(key, wrong))
        assert main(["fit", "--config", str(home / "bad.yaml")]) == 2
        assert f"did you mean '{right}'?" in one_line(capsys)
    assert main(["fit", "--config", str(home / "absent.yaml")]) == 2
    assert "no such config file" in one_line(capsys)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.init_args.pairs=[]", "name some pairs"),
        ("--model.init_args.pairs=[image-txt]", "did you mean 'text'?"),
        ("--model.init_args.anchor=sound", "no modality 'sound'"),
        ("--model.init_args.form=sigmod", "did you mean 'sigmoid'?"),
        ("--model.init_args.pairss=all", "did you mean 'pairs'?"),
        ("--model.init_args.optimizer=adam", "did you mean 'adamw'?"),
        ("--model.init_args.encoders.image.init_args.vews=2", "did you mean 'views'?"),
        ("--model.init_args.encoders.image.init_args.crops=[{cout: 1, size: 3}]", "did you mean 'count'?"),
        ("--model.init_args.encoders.image.init_args.crops=[{count: 0, size: 3}]", "count and size are at least 1"),
        ("--model=SwaV", "did you mean 'SwAV'?"),
    ],
)
def test_mistakes_in_an_objective_are_one_line(
    home: Path, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(home, option) == 2
    assert message in one_line(capsys)


def test_one_line_swaps_the_objective(home: Path) -> None:
    """The same YAML, encoders and data; only the class of the module is another."""
    for module in ("Symile", "SwAV", "HigherOrder"):
        assert fit(home, f"--model.class_path=mmrep.modules.{module}", "--trainer.max_epochs=1", name=module) == 0
        loss = mmrep.load(home / "runs" / module).loss
        assert type(loss).__name__ == {"SwAV": "ClusterSwapLoss", "HigherOrder": "GRAMLoss"}.get(
            module, f"{module}Loss"
        )
    assert fit(home, "--model.class_path=mmrep.modules.ModalityPairwise", name="views") == 2  # it needs views: says so


def test_an_existing_run_is_kept_until_the_new_one_can_start(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = home / "runs" / "base"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit(home, name="base") == 2
    assert "add --overwrite, --resume auto, or another --name" in one_line(capsys)
    assert fit(home, "--overwrite", "--data.path", "nowhere", name="base") == 2
    assert "no such folder" in one_line(capsys)
    assert fit(home, "--resume", "auto", "--model.init_args.embed_dim", "8", name="base") == 2
    assert "model.embed_dim is 16 there and 8 here" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (home / "runs" / "mine").mkdir()
    (home / "runs" / "mine" / "thesis.txt").write_text("years of work")
    assert fit(home, "--overwrite", name="mine") == 2
    assert "holds no run of mmrep" in one_line(capsys)
    assert (home / "runs" / "mine" / "thesis.txt").exists()


@pytest.fixture
def elsewhere(home: Path, tmp_path: Path) -> list[str]:
    """Options of a run whose checkpoints lie in a folder of other things."""
    (tmp_path / "thesis.txt").write_text("years of work")
    options = ["--checkpoint.dirpath", str(tmp_path), "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    if not (home / "runs" / "apart").exists():
        assert fit(home, *options, name="apart") == 0
        shutil.copytree(tmp_path, home / "apart")
    else:
        shutil.copytree(home / "apart", tmp_path, dirs_exist_ok=True)
    return options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.num_workers", "-1"], "too small"),
        (["--trainer.val_check_interval", "1000"], "`val_check_interval` (1000) must be less than or equal to the num"),
        (["--checkpoint.filename", "{nope"], "'{nope' names no file: expected '}' before end of string"),
        (["--checkpoint.monitor", "eval/knn/acc1"], "no callback logs 'eval/knn/acc1'"),
    ],
)
def test_a_start_that_fails_before_its_first_step_replaces_no_run(
    home: Path,
    elsewhere: list[str],
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = file_bytes(home / "runs"), file_bytes(tmp_path)
    capsys.readouterr()
    assert fit(home, *elsewhere, "--overwrite", *options, name="apart") == 2
    assert message in one_line(capsys)
    assert (file_bytes(home / "runs"), file_bytes(tmp_path)) == before


def test_a_signal_or_a_mistake_in_code_before_the_first_step_replaces_no_run(
    home: Path,
    elsewhere: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = file_bytes(home / "runs"), file_bytes(tmp_path)

    def fail(*_: object) -> None:
        raise ValueError("no such colour")

    with monkeypatch.context() as patch:
        patch.setattr("mmrep.modules.PairwiseCLIP.training_step", fail)
        with pytest.raises(ValueError, match="no such colour"):  # a traceback, and not one line
            fit(home, *elsewhere, "--overwrite", name="apart")
    assert (file_bytes(home / "runs"), file_bytes(tmp_path)) == before
    monkeypatch.setattr("mmrep.modules.fault_tolerance.preemption.StopSignals.asked", lambda _: True)
    capsys.readouterr()
    assert fit(home, *elsewhere, "--overwrite", name="apart") == 0
    said = capsys.readouterr().out
    assert "mmrep: stopped before the first step" in said and "no step was made: the earlier run stays in" in said
    assert (file_bytes(home / "runs"), file_bytes(tmp_path)) == before


@pytest.mark.parametrize("options", [["--trainer.limit_train_batches", "0"], ["--ckpt_path", "BASE"]])
def test_a_start_with_nothing_to_train_replaces_no_run(
    home: Path, elsewhere: list[str], tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = file_bytes(home / "runs"), file_bytes(tmp_path)
    words = [str(home / "runs" / "base" / "checkpoints" / "last.ckpt") if word == "BASE" else word for word in options]
    capsys.readouterr()
    assert fit(home, *elsewhere, "--overwrite", *words, name="apart") == 0
    assert "no step was made: the earlier run stays in" in (said := capsys.readouterr().out) and "model in" not in said
    assert (file_bytes(home / "runs"), file_bytes(tmp_path)) == before


class EarlierRun:
    """A run ``x`` whose checkpoints lie elsewhere, beside a model of somebody else's."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.path, self.checkpoints = folder / "runs", folder / "runs" / "x", folder / "models"
        for place in (self.path / "model", self.checkpoints):
            place.mkdir(parents=True)
        (self.path / "config.yaml").write_text("good")
        (self.path / "model" / "weights").write_text("good")
        (self.checkpoints / "foreign.ckpt").write_text("of others")
        torch.save({CONFIG_KEY: {}, "state_dict": {}}, self.checkpoints / "last.ckpt")

    def start(self, *, overwrite: bool = True, resume: str | None = None) -> RunFolder:
        """Up to the first step."""
        folder = RunFolder(self.runs, "x")
        folder.check(self.checkpoints, overwrite=overwrite, resume=resume)
        folder.make_way(self.checkpoints, overwrite=overwrite)
        self.path.mkdir(exist_ok=True)
        if overwrite:
            (self.path / "config.yaml").write_text("new")
        return folder


def test_what_a_killed_start_set_aside_has_its_place_back_at_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = EarlierRun(tmp_path)
    before = file_bytes(tmp_path)
    earlier.start()  # and no step
    assert file_bytes(tmp_path) != before
    earlier.start().put_back()
    assert file_bytes(tmp_path) == before
    earlier.start()
    capsys.readouterr()
    earlier.start(overwrite=False, resume="auto")
    assert file_bytes(tmp_path) == before and "the last start made no step: the earlier run" in capsys.readouterr().out
    earlier.start()
    with pytest.raises(ConfigError, match="the run folder exists"):
        earlier.start(overwrite=False)
    assert file_bytes(tmp_path) == before


def test_checkpoints_of_others_are_neither_replaced_nor_in_the_way(tmp_path: Path) -> None:
    earlier = EarlierRun(tmp_path)
    earlier.start().forget()
    assert [path.name for path in earlier.checkpoints.iterdir()] == ["foreign.ckpt"]
    RunFolder(earlier.runs, "new").check(earlier.checkpoints, overwrite=False, resume=None)


def test_the_earlier_run_goes_with_the_first_step_of_the_optimiser(tmp_path: Path) -> None:
    earlier = EarlierRun(tmp_path)
    first, accumulates = FirstStep(earlier.start()), True
    loop = SimpleNamespace(_should_accumulate=lambda: accumulates)
    trainer: Any = SimpleNamespace(is_global_zero=True, fit_loop=loop)
    first.on_train_batch_end(trainer)
    assert (earlier.runs / "x.replaced.part").exists() and not first.made
    accumulates = False
    first.on_train_batch_end(trainer)
    assert [path.name for path in earlier.runs.iterdir()] == ["x"] and first.made


def test_a_start_that_another_one_took_the_place_of_ends(tmp_path: Path) -> None:
    earlier = EarlierRun(tmp_path)
    before = file_bytes(tmp_path)
    one = earlier.start()
    with pytest.raises(ConfigError, match="the run folder exists"):
        earlier.start(overwrite=False)
    with pytest.raises(ConfigError, match="start one at a time"):
        one.forget()
    one.put_back()
    assert file_bytes(tmp_path) == before


def test_a_run_that_cannot_be_put_back_is_not_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = EarlierRun(tmp_path)
    before = file_bytes(tmp_path)
    folder = earlier.start()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        folder.put_back()
        said = capsys.readouterr()
        assert "stays aside (Input/output error)" in said.err and "stays in" not in said.out
        with pytest.raises(ConfigError, match=r"move .*x\.replaced\.part there"):
            earlier.start(overwrite=False)
    earlier.start(overwrite=False, resume="auto")
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("end", ["forget", "put_back"])
def test_a_run_folder_on_another_disk_stays_there(end: str, tmp_path: Path) -> None:
    earlier = EarlierRun(tmp_path)
    disk = tmp_path / "disk"
    disk.mkdir()
    earlier.path.rename(disk / "x")
    earlier.path.symlink_to(disk / "x")
    getattr(earlier.start(), end)()
    assert earlier.path.is_symlink() and [path.name for path in disk.iterdir()] == ["x"]
    assert (disk / "x" / "config.yaml").read_text() == ("good" if end == "put_back" else "new")


class BrokenEncoder(ConvImageEncoder):
    """One of a user, with a mistake."""

    def __init__(self, embed_dim: int, size: int = 4) -> None:
        super().__init__(embed_dim, image_size=int("four"))


class BrokenCallback(pl.Callback):
    """The same."""

    def __init__(self, at: int = 4) -> None:
        self.at = {}["step"]


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ("--model.init_args.encoders.image=tests.test_cli.BrokenEncoder", "invalid literal"),
        ("--trainer.callbacks+=tests.test_cli.BrokenCallback", "^'step'$"),
    ],
)
def test_a_mistake_in_a_class_of_the_users_has_its_traceback(home: Path, option: str, error: str) -> None:
    with pytest.raises((ValueError, KeyError), match=error) as raised:
        fit(home, option)
    assert raised.traceback[-1].path == Path(__file__) and raised.value.__context__ is None


def test_checkpoints_elsewhere_belong_to_the_run_that_is_replaced(
    home: Path, elsewhere: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "epoch=8-step=99.ckpt"
    shutil.copy(tmp_path / "last.ckpt", stale)
    capsys.readouterr()
    assert fit(home, *elsewhere, name="fresh") == 2
    assert "the folder holds checkpoints of another run" in one_line(capsys)
    assert fit(home, *elsewhere, "--overwrite", "--ckpt_path", str(stale), name="fresh") == 2
    assert "would remove the checkpoint" in one_line(capsys)
    assert fit(home, *elsewhere, "--overwrite", name="apart") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "epoch=0-step=3.ckpt", "last.ckpt"}
    assert not list((home / "runs").glob("*.part"))


def test_resume_auto_goes_before_the_checkpoint_of_the_first_start(home: Path) -> None:
    """Given both, a scheduler may start the command again and again."""
    first = str(home / "runs" / "base" / "checkpoints" / "last.ckpt")
    for _ in range(2):
        options = ["--ckpt_path", first, "--resume", "auto", "--trainer.max_epochs", "3"]
        assert fit(home, *options, name="both") == 0
    run = home / "runs" / "both"
    assert {row["epoch"] for row in rows(run / "metrics.before-resume-1.csv")} == {"2"}
    assert (run / "model").exists() and not (run / "model.before-resume-1").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "nowhere", "--data", "SHARDS"], "no model [nowhere]"),
        (["--checkpoint", "RUN", "--data", "nowhere"], "no index.json"),
        (["--checkpoint", "RUN", "--data", "SHARDS", "--split", "tset"], "did you mean 'test'?"),
        (["--checkpoint", "RUN", "--data", "SHARDS", "--direction", "txt->image"], "did you mean 'text'?"),
    ],
)
def test_eval_mistakes(
    home: Path, tiny_shards: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(home / "runs" / "base"), "SHARDS": str(tiny_shards)}
    assert main(["eval", "retrieval", *(places.get(word, word) for word in options)]) == 2
    assert message in one_line(capsys)


def test_data_index_check_and_stats(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(tiny_shards, tmp_path / "shards")
    (folder / "index.json").unlink()
    modalities = ["--modality", "image=png,jpg", "--modality", "text=txt", "--modality", "sound=flac"]
    assert main(["data", "index", str(folder), *modalities, "--group-key", "label", "--label-key", "label"]) == 0
    assert main(["data", "check", str(folder)]) == 0
    assert main(["data", "stats", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "88 samples in 5 shards" in out and "sound" in out and "16 (80%)" in out
    (folder / "val-000000.tar").write_bytes(b"\0" * (folder / "val-000000.tar").stat().st_size)
    assert main(["data", "check", str(folder)]) == 2
    assert "val-000000.tar" in one_line(capsys)
    (folder / "index.json").unlink()
    for wrong, message in (
        (["--modality", "image"], "image=jpg"),
        (["--modality", "x=exe"], "no decoder"),
        ([], "no modality"),
    ):
        assert main(["data", "index", str(folder), *wrong]) == 2
        assert message in one_line(capsys)


def test_help_answers_without_importing_torch() -> None:
    """A fresh process: at most a second of CPU, and no heavy module."""
    code = (
        "import sys, time, mmrep.cli; code = mmrep.cli.main(['--help']); "
        "assert code == 0 and not {'torch', 'pytorch_lightning'} & set(sys.modules); print('CPU', time.process_time())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "mmrep COMMAND" in out and float(out.split("CPU")[1]) < 1.0


def test_the_command_itself() -> None:
    command = Path(sys.executable).with_name("mmrep")
    start = time.monotonic()
    result = subprocess.run([command, "fti"], capture_output=True, text=True, env={**os.environ})
    assert result.returncode == 2 and result.stderr == "mmrep: error: no command 'fti'; did you mean 'fit'?\n"
    assert time.monotonic() - start < 30
    assert (
        subprocess.run([command, "--version"], capture_output=True, text=True).stdout == f"mmrep {mmrep.__version__}\n"
    )


def test_a_blend_in_the_yaml(home: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny import write_tiny_shards

    other = write_tiny_shards(tmp_path / "other", {"train": (30,), "test": (5,)})
    config = yaml.safe_load((home / "config.yaml").read_text())
    config["data"]["path"] = [{"path": str(tiny_shards), "weight": 3}, {"path": str(other), "weight": 1.0}]
    config["data"]["batching"] = "stratified"
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(config))
    start = ["fit", "--config", str(tmp_path / "blend.yaml"), "--trainer.max_epochs", "1"]
    assert main([*start, "--name", "blend"]) == 0
    saved = yaml.safe_load((home / "runs" / "blend" / "config.yaml").read_text())["data"]["path"]
    assert [(part["weight"], part["split"]) for part in saved] == [(3, None), (1, None)]
    steps = [int(row["step"]) for row in rows(home / "runs" / "blend" / "metrics.csv")]
    assert max(steps) == (48 + 30) // 16 - 1
    capsys.readouterr()
    assert main([*start, "--name", "wrong", "--data.batching", "stratifed"]) == 2
    assert "did you mean 'stratified'" in one_line(capsys)
    config["data"]["path"][1]["wieght"] = 2
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(config))
    assert main([*start, "--name", "wrong"]) == 2
    assert "unknown key 'wieght'; did you mean 'weight'?" in one_line(capsys)


def test_a_trained_model_is_classified_reported_searched_and_exported(
    home: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command after training, by its name, on one run."""
    run, data = str(home / "runs" / "base"), str(tiny_shards)
    out = home / "after"
    words = ["--checkpoint", run, "--data", data]
    assert main(["eval", "classification", *words, "--label", "label", "--out", str(out / "classes.json")]) == 0
    assert json.loads((out / "classes.json").read_text())["classes"] == 6
    assert main(["eval", "report", *words, "--out", str(out / "report.html")]) == 0
    assert "audio+text-&gt;image" in (out / "report.html").read_text()
    assert main(["embed", *words, "--split", "test", "--out", str(out / "embedded")]) == 0
    query = ["--text", "a red thing 0", "-k", "3", "--out", str(out / "hits.json"), "--html", str(out / "hits.html")]
    assert main(["search", "--index", str(out / "embedded"), "--target", "image", *query]) == 0
    assert json.loads((out / "hits.json").read_text()) and (out / "hits.html").is_file()
    assert (
        main(["export", "--checkpoint", run, "--out", str(out / "model"), "--result", str(out / "classes.json")]) == 0
    )
    assert "classification on" in (out / "model" / "README.md").read_text()
    assert set(mmrep.load(out / "model").modalities) == {"image", "text", "audio"}
    capsys.readouterr()
    for wrong, message in [
        (
            ["eval", "report", "--checkpoint", run, "--data", data, "--out", str(out / "report.html")],
            "the result exists",
        ),
        (["eval", "report", *words], "add --out FILE.html"),
        (["export", "--checkpoint", run, "--out", str(out / "report.html" / "below")], "cannot be read or written"),
        (["search", "--index", str(out), "--text", "x"], "manifest"),
        (["embed", "--checkpoint", run, "--data", str(home), "--out", str(out / "no")], "index.json"),
        (["eval", "classification", *words, "--label", "lable"], "did you mean 'label'"),
        (["exprot"], "did you mean 'export'"),
    ]:
        assert main(wrong) == 2
        assert message in one_line(capsys), wrong
    with pytest.raises(SystemExit):  # argparse, for words that it does not know
        main(["search", "--index", str(out / "embedded"), "--video", "x"])
    assert "unrecognized" in capsys.readouterr().err


def test_a_dry_run_leaves_an_earlier_run_as_it_is(home: Path) -> None:
    before = file_bytes(home / "runs" / "base")
    assert fit(home, "--trainer.fast_dev_run", "true", "--overwrite", name="base") == 0
    assert file_bytes(home / "runs" / "base") == before
