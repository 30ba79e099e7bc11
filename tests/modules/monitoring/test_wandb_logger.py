"""Weights & Biases: what is written offline is all there, and no network that is away, silent or lost stops a run."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml

import mmrep.cli.watching
from mmrep.cli import main
from mmrep.modules import PairwiseCLIP
from mmrep.modules.monitoring import run_media, wandb_logger
from mmrep.modules.monitoring.wandb_logger import OfflineSafeWandbLogger
from tests.modules.monitoring.wandb_files import FakeServer, contents, records
from tests.test_cli import CONFIG


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    folder = tmp_path_factory.mktemp("home")
    data = {"path": str(tiny_shards), "global_batch_size": 16, "num_workers": 0}
    trainer = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 1}
    text = yaml.safe_dump({**CONFIG, "data": data, "trainer": trainer, "runs": str(folder / "runs")})
    (folder / "config.yaml").write_text(text)
    return folder


def fit(home: Path, name: str, *options: str) -> tuple[int, list[str], float]:
    """Exit code, warnings of wandb's, and seconds."""
    start, error = time.monotonic(), io.StringIO()
    with redirect_stderr(error):
        code = main(["fit", "--config", str(home / "config.yaml"), "--name", name, "--wandb", *options])
    about = [line for line in error.getvalue().splitlines() if line.startswith("mmrep: ")]
    return code, about, time.monotonic() - start


def test_config_metrics_tables_and_page_are_kept_offline_and_a_run_that_goes_on_is_the_same(home: Path) -> None:
    assert fit(home, "offline", "--trainer.max_epochs", "2", "--tensorboard")[:2] == (0, [])
    run = home / "runs" / "offline"
    (kept,) = run.glob("wandb/offline-run-*/*.wandb")
    config, history, run_id = contents(kept)
    assert config["model"]["init_args"]["lr"] == 5e-3 and config["data"]["global_batch_size"] == 16
    assert config["seed_everything"] == 0 and config["trainer"]["max_epochs"] == 2
    with (run / "metrics.csv").open() as file:
        written = {int(row["step"]): row for row in csv.DictReader(file) if row["train/loss"]}
    logged = {int(row["trainer/global_step"]): row for row in history if "train/loss" in row}
    assert set(logged) == set(written) == set(range(6))
    assert all(float(written[step]["train/loss"]) == pytest.approx(logged[step]["train/loss"]) for step in logged)
    assert "train/samples_per_second" in logged[5] and "train/learning_rate" in logged[5]
    tables = [row["val/retrieval"] for row in history if "val/retrieval" in row]
    assert len(tables) == 2, "one for each validation"
    table = json.loads((kept.parent / "files" / tables[-1]["path"]).read_text())
    assert table["columns"][:2] == ["direction", "queries"] and len(table["data"]) == 9
    validated = [row for row in history if "val/text->image/recall@1" in row][-1]
    cells = dict(zip(table["columns"], next(row for row in table["data"] if row[0] == "text->image"), strict=True))
    assert cells["recall@1"] == pytest.approx(validated["val/text->image/recall@1"])
    (page,) = [row["examples"] for row in history if "examples" in row]
    html = (kept.parent / "files" / page["path"]).read_text()
    assert html == (run / "examples.html").read_text() and html.count("<details") == 9 and "data:image" in html

    assert fit(home, "offline", "--resume", "auto", "--trainer.max_epochs", "3")[0] == 0
    found = {contents(path)[2] for path in run.glob("wandb/offline-run-*/*.wandb")}
    assert found == {run_id, (run / "wandb_run_id.txt").read_text().strip()}
    assert len(list(run.glob("wandb/offline-run-*"))) == 2
    events = b"".join(path.read_bytes() for path in run.rglob("events.out.tfevents*"))
    assert b"| text-&gt;image" in events or b"| text->image |" in events, "TensorBoard has the table as text"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if there were an account, and no patience."""
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb_logger, "TIMEOUTS", {"init_timeout": 2.0, "finish_timeout": 3.0, "login_timeout": 2.0})
    wandb.teardown()  # it reads the environment once in a process
    yield monkeypatch
    with suppress(Exception):  # a service that crashed is none that can be closed
        wandb.teardown()


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_a_run_that_cannot_begin_online_begins_offline(kind: str, home: Path, online: pytest.MonkeyPatch) -> None:
    with FakeServer(answers=0) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = server.url if kind == "silent" else f"http://127.0.0.1:{closed.getsockname()[1]}"
        online.setenv("WANDB_BASE_URL", url)
        code, about, seconds = fit(home, kind)
    assert code == 0 and seconds < 60
    assert len(about) == 1 and "wandb cannot be reached" in about[0] and "wandb sync" in about[0]
    (kept,) = (home / "runs" / kind).glob("wandb/offline-run-*/*.wandb")
    _, history, _ = contents(kept)
    assert any("train/loss" in row for row in history) and any("examples" in row for row in history)
    assert (home / "runs" / kind / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_server_that_is_lost_in_the_middle_ends_nothing(home: Path, online: pytest.MonkeyPatch) -> None:
    """Four answers are what it takes to begin."""
    online.setattr(wandb_logger, "TIMEOUTS", {"init_timeout": 10.0, "finish_timeout": 3.0, "login_timeout": 10.0})
    with FakeServer(answers=4) as server:
        online.setenv("WANDB_BASE_URL", server.url)
        code, about, seconds = fit(home, "lost")
    assert any("UpsertBucket" in body for body in server.bodies), "it had begun"
    assert code == 0 and about == [] and seconds < 40
    (kept,) = (home / "runs" / "lost").glob("wandb/run-*/*.wandb")
    config, history, _ = contents(kept)
    assert config["model"]["init_args"]["lr"] == 5e-3
    assert any("train/loss" in row for row in history) and any("examples" in row for row in history)
    (shown,) = [row["val/retrieval"] for row in history if "val/retrieval" in row]
    assert shown["_type"] == "html-file", "a table asks the server first; its page does not"
    assert (home / "runs" / "lost" / "model" / "model.safetensors").exists()


def test_a_service_process_that_crashes_ends_nothing(home: Path, online: pytest.MonkeyPatch) -> None:
    """What wandb's own does where a server answers everything with nothing."""
    with FakeServer() as server:
        online.setenv("WANDB_BASE_URL", server.url)
        code, about, _ = fit(home, "crashed")
    assert code == 0 and len(about) <= 1
    assert (home / "runs" / "crashed" / "model" / "model.safetensors").exists()


def test_without_a_key_nobody_is_asked(
    tmp_path: Path, online: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    online.delenv("WANDB_API_KEY")
    online.setenv("HOME", str(tmp_path))
    online.setenv("NETRC", str(tmp_path / "none"))
    logger = OfflineSafeWandbLogger(tmp_path / "run", "mmrep")
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("success")
    assert "mmrep: warning: wandb cannot be reached (No API key" in capsys.readouterr().err
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))


def test_whatever_wandb_raises_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.Error("the service is gone\nand more")

    logger = OfflineSafeWandbLogger(tmp_path / "run", "mmrep")
    run = logger.experiment
    run.log, logger._warned = fail, False
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
    logger.log_page("page", "<p>")
    logger.log_rows("table", ["a"], [[1]], "<p>")
    about = [line for line in capsys.readouterr().err.splitlines() if "wandb failed" in line]
    after = f"the run goes on, afterwards: wandb sync {tmp_path}/run/wandb/*run-*"
    assert about == [f"mmrep: warning: wandb failed (the service is gone); {after}"]
    logger.finalize("failed")


def test_what_raises_at_the_very_beginning_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise wandb.Error("the service is gone")

    logger = OfflineSafeWandbLogger(tmp_path / "run", "mmrep")
    monkeypatch.setattr(wandb_logger, "_define_steps", fail)
    assert logger.experiment is logger.experiment
    logger.finalize("success")
    assert capsys.readouterr().err.count("wandb failed (the service is gone)") == 1
    never = OfflineSafeWandbLogger(tmp_path / "never", "mmrep")
    monkeypatch.setattr(never, "_begin", fail)
    never.log_rows("table", ["a"], [[1]], "<p>")
    never.log_page("page", "<p>")
    assert capsys.readouterr().err.count("wandb failed (the service is gone)") == 1


def test_a_run_that_was_told_to_stop_is_shown_as_preempted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = PairwiseCLIP.training_step

    def told(self: PairwiseCLIP, *batch: Any) -> Any:
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, *batch)

    monkeypatch.setattr(PairwiseCLIP, "training_step", told)
    assert fit(home, "told")[0] == 0
    (kept,) = (home / "runs" / "told").glob("wandb/offline-run-*/*.wandb")
    contents(kept)
    kinds = [record.WhichOneof("record_type") for record in records(kept)]
    assert "preempting" in kinds and kinds.index("preempting") < kinds.index("exit")


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_the_page_is_made_in_the_precision_of_the_training(
    precision: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autocast: list[bool] = []
    embed = run_media.embed_loader

    def look(*args: Any) -> Any:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return embed(*args)

    monkeypatch.setattr(run_media, "embed_loader", look)
    assert fit(home, precision, "--trainer.precision", precision)[:2] == (0, [])
    assert autocast == [precision == "bf16-mixed"] and (home / "runs" / precision / "examples.html").is_file()


def test_no_page_of_examples_costs_the_model(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    def fail(model: Any, *_: Any) -> None:
        model.eval()
        raise torch.OutOfMemoryError("CUDA out of memory\nand a page of advice")

    class Look(run_media.RunMedia):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.train()
            super().on_fit_end(trainer, pl_module)
            modes.append(pl_module.model.training)

    monkeypatch.setattr(run_media, "embed_loader", fail)
    monkeypatch.setattr(mmrep.cli.watching, "RunMedia", Look)
    code, about, _ = fit(home, "large")
    assert code == 0 and about == ["mmrep: warning: no page of examples: CUDA out of memory"] and modes == [True]
    assert (home / "runs" / "large" / "model" / "model.safetensors").exists()


def test_where_wandb_cannot_write_either_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init, modes = wandb.init, list[str]()

    def refuse(*, mode: str | None = None, **options: Any) -> Any:
        modes.append(mode or "as asked")
        if mode != "disabled":
            raise OSError("no space left on device")
        return init(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", refuse)
    logger = OfflineSafeWandbLogger(tmp_path / "run", "mmrep")
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
    logger.log_rows("table", ["a"], [[1]], "<p>")
    logger.finalize("success")
    assert modes == ["as asked", "offline", "disabled"]
    assert capsys.readouterr().err.count("mmrep: warning: wandb cannot be reached (no space left on device)") == 1


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_named_in_one_line(
    package: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = mmrep.cli.watching.find_spec
    monkeypatch.setattr(mmrep.cli.watching, "find_spec", lambda name: None if name == package else find(name))
    assert main(["fit", "--config", str(home / "config.yaml"), "--name", "absent", f"--{package}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and f"pip install 'mmrep[{package}]'" in error[0]
    assert not (home / "runs" / "absent").exists()
