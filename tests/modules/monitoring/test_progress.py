"""What is shown while a run goes on: plain lines, the bar, nothing said twice, and metrics.csv whatever else logs."""

from __future__ import annotations

import csv
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace

from mmrep.cli import main
from mmrep.cli.run_folder import RunFolder
from mmrep.cli.watching import Watching
from mmrep.modules import PairwiseCLIP
from mmrep.modules.monitoring.model_line import model_line
from mmrep.modules.monitoring.plain_progress import PlainProgress
from mmrep.modules.monitoring.progress_bar import RunProgressBar
from mmrep.modules.monitoring.throughput import Throughput
from tests.modules.monitoring.test_throughput import ENCODERS, fit
from tests.test_cli import CONFIG

LINE = re.compile(
    r"epoch (?P<epoch>\d+)  step (?P<step>\d+)/(?P<total>\d+)  train/loss [\d.]+  val/loss [\d.]+"
    r"  [\d.,]+ samples/s  data wait \d+ %  ETA 0:0\d:\d\d"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("home")
    data = {"path": str(tiny_shards), "global_batch_size": 16, "num_workers": 0}
    trainer = {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1, "limit_val_batches": 1}
    text = yaml.safe_dump({**CONFIG, "data": data, "trainer": trainer, "runs": str(folder / "runs")})
    (folder / "config.yaml").write_text(text)
    return folder


def run(home: Path, name: str, *options: str) -> Path:
    assert main(["fit", "--config", str(home / "config.yaml"), "--name", name, *options]) == 0
    return home / "runs" / name


def test_a_plain_run_says_a_line_an_epoch_and_warns_of_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = run(home, "plain", "--trainer.max_epochs", "3")
    assert [str(warning.message) for warning in caught] == []
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert lines[0].endswith("PairwiseCLIPLoss 1") and "parameters" in lines[0]
    epochs = [LINE.fullmatch(line) for line in lines[1:4]]
    assert [(m["epoch"], m["step"], m["total"]) for m in epochs if m] == [
        ("0", "3", "9"),
        ("1", "6", "9"),
        ("2", "9", "9"),
    ]
    assert lines[3].endswith("ETA 0:00:00") and lines[4].startswith("throughput: ")
    assert lines[-1].startswith("model in ") and len(set(lines)) == len(lines)
    assert (folder / "throughput.json").exists()


def test_steps_and_time_left_go_on_where_the_run_went_on(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(home, "resumed", "--trainer.max_epochs", "1")
    capsys.readouterr()
    run(home, "resumed", "--trainer.max_epochs", "3", "--resume", "auto")
    found = [LINE.fullmatch(line) for line in capsys.readouterr().out.splitlines()]
    assert [(m["epoch"], m["step"], m["total"]) for m in found if m] == [("1", "6", "9"), ("2", "9", "9")]


def columns(folder: Path) -> set[str]:
    with (folder / "metrics.csv").open() as file:
        return {name for row in csv.DictReader(file) for name, value in row.items() if value}


def test_metrics_csv_is_always_written(home: Path, tmp_path: Path) -> None:
    own = {"class_path": "pytorch_lightning.loggers.TensorBoardLogger", "init_args": {"save_dir": str(tmp_path)}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"trainer": {"logger": [own]}}))
    for name, options in {
        "none": ["--trainer.logger", "false"],
        "own": ["--config", str(tmp_path / "own.yaml")],
        "tensorboard": ["--tensorboard"],
    }.items():
        folder = run(home, name, "--trainer.max_epochs", "1", *options)
        assert {"train/loss", "train/samples_per_second", "train/data_wait_share", "train/learning_rate"} <= columns(
            folder
        )
        assert {"train/gradient_norm", "train/logit_scale", "val/loss"} <= columns(folder)
        assert (folder / "config.yaml").exists()
    assert list(tmp_path.rglob("events.out.tfevents*")), "the logger of the config logs too"


def test_progress_can_be_forbidden_and_a_bar_of_the_config_stays(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(home, "silent", "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false")
    assert "epoch 0" not in capsys.readouterr().out
    bar = {"class_path": "pytorch_lightning.callbacks.TQDMProgressBar"}
    (tmp_path / "bar.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [bar]}}))
    run(home, "bar", "--trainer.max_epochs", "1", "--config", str(tmp_path / "bar.yaml"))
    shown = capsys.readouterr()
    assert "Epoch 0" in shown.out + shown.err and "epoch 0" not in shown.out


def test_one_callback_of_the_config_and_a_bar_of_any_name_are_a_list_s(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_bar.py").write_text(
        "from pytorch_lightning.callbacks import TQDMProgressBar\n\n\nclass MyBar(TQDMProgressBar):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, callbacks in {
        "one": {"class_path": "pytorch_lightning.callbacks.TQDMProgressBar"},
        "named": [{"class_path": "own_bar.MyBar"}],
        "other": {"class_path": "pytorch_lightning.callbacks.LearningRateMonitor"},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
        run(home, name, "--trainer.max_epochs", "1", "--config", str(tmp_path / f"{name}.yaml"))
        shown = capsys.readouterr()
        assert ("Epoch 0" in shown.out + shown.err) == (name != "other"), "their bar"
        assert ("epoch 0" in shown.out) == (name == "other"), "or our lines"


def test_a_report_that_other_processes_wrote_is_printed_and_an_earlier_one_is_not(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under ddp_fork, where the trainer of the first process has trained nothing itself."""
    folder = run(home, "forked", "--trainer.max_epochs", "1")
    capsys.readouterr()
    options = Namespace(trainer=Namespace(fast_dev_run=False, callbacks=None), wandb=False, tensorboard=False)
    watching = Watching(options, "fit", RunFolder(folder.parent, folder.name))
    watching.print_report()
    assert capsys.readouterr().out == ""
    report = folder / "throughput.json"
    report.write_text(report.read_text())
    watching.print_report()
    assert capsys.readouterr().out.startswith("throughput: ")


def drawn(shards: Path, *callbacks: pl.Callback, **options: Any) -> str:
    """What the bar draws on a terminal, without its colours."""
    screen, timing = io.StringIO(), Throughput(warmup_steps=1)
    console = {"force_terminal": True, "file": screen, "width": 140, "legacy_windows": False}
    fit(shards, [timing, _Eager(timing, console), *callbacks], **options)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())


class _Eager(RunProgressBar):
    """Looks at the figures every time."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        self._last = 0.0
        return super().get_metrics(trainer, pl_module)


def test_the_bar_has_rates_and_the_time_left_of_the_run(tiny_shards: Path) -> None:
    states = drawn(tiny_shards)
    assert re.search(
        r"Epoch 1/1 .* 3/3 loss: [\d.]+ val: [\d.]+ samples/s: [\d.,]+ data wait: \d+ % ETA: 0:00:00", states
    )
    assert "Epoch 0/1" in states and "it/s" not in states


class Endless(pl.Callback):
    """Ends a run that knows no end."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 7


def test_a_run_without_an_end_has_rates_and_no_time_left(tiny_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = drawn(tiny_shards, Endless(), max_epochs=-1)
    assert "samples/s: " in states and "ETA" not in states and re.search(r"Epoch 2\b", states)
    capsys.readouterr()
    timing = Throughput(warmup_steps=1)
    fit(tiny_shards, [timing, PlainProgress(timing), Endless()], max_epochs=-1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert "step 3  " in lines[0] and "samples/s" in lines[0] and "ETA" not in "".join(lines)


def test_the_bar_looks_at_a_loss_twice_a_second_at_most(tiny_shards: Path) -> None:
    looks: list[int] = []

    class Counting(RunProgressBar):
        def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
            before = self._last
            figures = super().get_metrics(trainer, pl_module)
            looks.append(int(self._last != before))
            return figures

    timing = Throughput()
    fit(tiny_shards, [timing, Counting(timing, {"file": io.StringIO()})], max_epochs=4)
    assert len(looks) > 12 and 1 <= sum(looks) < len(looks) / 2


def test_the_line_of_the_model_counts_its_parameters() -> None:
    module = PairwiseCLIP(ENCODERS, embed_dim=8, share={"caption": "text"}, freeze=["image"])
    line = model_line(module)
    total = sum(weight.numel() for weight in module.model.parameters())
    trained = sum(weight.numel() for weight in module.model.parameters() if weight.requires_grad)
    assert line.startswith(f"{total / 1000:.1f} k parameters, {trained / 1000:.1f} k trained: image ConvImageEncoder ")
    assert "caption shares that of text" in line and line.endswith("PairwiseCLIPLoss 1")
