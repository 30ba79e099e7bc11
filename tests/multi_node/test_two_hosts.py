"""Training over two hosts with an address and a disk each: as one process, and no rank alone with what it believes."""

from __future__ import annotations

import copy
import csv
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import mmrep
from mmrep.cli import main, meeting
from mmrep.data.index import Index
from mmrep.modules.fault_tolerance import watchdog
from tests.data.server import served
from tests.multi_node.hosts import Host, two_hosts, wait
from tests.multi_node.launching import as_srun, as_torchrun, command, start
from tests.multi_node.record import read_keys
from tests.test_cli import CONFIG
from tests.tiny import write_tiny_shards

SECONDS = 90
HTTP = 8123


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Two epochs of AdamW in fp64: it moves a weight by a whole step whatever the size of its gradient, rounding included."""
    content: dict[str, Any] = copy.deepcopy(CONFIG)
    content["model"]["init_args"]["encoders"]["audio"]["init_args"]["augment"] = False  # its noise is drawn by rank
    content["data"]["path"] = str(tiny_shards)
    content["trainer"] |= {"precision": "64-true", "max_epochs": 2}
    content["checkpoint"] = {"save_top_k": -1}
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def words(config: Path, folder: Path, *options: str) -> list[str]:
    """A run in ``folder/runs/run`` that records what it sees in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    record = f"[{{class_path: tests.multi_node.record.RecordKeys, init_args: {{folder: {folder}}}}}]"
    start_words = ["fit", "--config", str(config), "--runs", str(folder / "runs"), "--name", "run"]
    return [*start_words, "--trainer.callbacks", record, *options]


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(words(config, folder)) == 0
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """What a run ended with."""
    checkpoint = torch.load(folder / "runs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    return {name: value for name, value in checkpoint["state_dict"].items() if value.is_floating_point()}


def difference(run: Path, alone: Path) -> float:
    """The largest relative difference of a tensor."""
    one, other = weights(alone), weights(run)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-12)) for name in one)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


def serve(host: Host, folder: Path, output: Path) -> str:
    """Serve a folder from a host; gives its URL."""

    def forever() -> None:
        with served(folder, host.address, HTTP):
            time.sleep(600)

    host.fork(forever, output, {})
    return f"http://{host.address}:{HTTP}"


@pytest.mark.parametrize(("namespaces", "per_node"), [(None, 2), (False, 1)])
def test_with_a_disk_each_and_shards_over_http_as_one_process(
    namespaces: bool | None, per_node: int, config: Path, alone: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    with two_hosts(namespaces) as both:
        url = serve(both[0], tiny_shards, tmp_path / "server.txt")

        def on(node: int) -> list[str]:
            disk = tmp_path / f"disk{node}"
            return words(config, disk, "--data.path", url, "--data.cache_dir", str(disk / "cache"))

        assert wait(start(both, on, tmp_path, as_torchrun, per_node), SECONDS) == [0] * 2 * per_node
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for node in (0, 1):
        for rank in range(node * per_node, (node + 1) * per_node):
            shutil.move(disks[node] / f"rank{rank}.jsonl", tmp_path / f"rank{rank}.jsonl")
    assert read_keys(tmp_path, 2 * per_node) == read_keys(alone, 1)
    assert difference(disks[0], alone) < 1e-6
    assert mmrep.load(disks[0] / "runs" / "run").encode(text=["a red thing"])["text"].shape == (1, 16)
    assert {path.name for path in (disks[0] / "runs" / "run").iterdir()} >= {"config.yaml", "metrics.csv", "model"}
    saved = yaml.safe_load((disks[0] / "runs" / "run" / "config.yaml").read_text())
    assert saved["trainer"]["devices"] == "auto" and saved["trainer"]["num_nodes"] == 1  # it runs anywhere
    assert not (disks[1] / "runs").exists()
    trained_on = {shard.sha256 for shard in Index.load(tiny_shards).shards if not shard.name.startswith("test")}
    for disk in disks:  # every node has every shard of train and val
        assert trained_on <= {path.stem for path in (disk / "cache").glob("*.tar")}


def test_as_srun_starts_it_over_an_earlier_run_in_a_shared_folder(
    config: Path, alone: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    shutil.copytree(alone / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "run" / "checkpoints" / "of before.ckpt").touch()

    def on(node: int) -> list[str]:
        return words(config, tmp_path, "--overwrite")

    assert wait(start(hosts, on, tmp_path, as_srun), SECONDS) == [0, 0]
    assert read_keys(tmp_path, 2) == read_keys(alone, 1)
    assert difference(tmp_path, alone) < 1e-6
    run = tmp_path / "runs" / "run"
    assert not (run / "checkpoints" / "of before.ckpt").exists() and not list(run.glob("metrics.before*"))
    assert len(list(csv.reader((run / "metrics.csv").open()))) == len(
        list(csv.reader((alone / "runs" / "run" / "metrics.csv").open()))
    )


def test_the_test_split_is_counted_once_over_both(
    config: Path, alone: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    checkpoint = alone / "runs" / "run" / "checkpoints" / "last.ckpt"

    def on(folder: Path) -> list[str]:
        start_words = ["test", "--config", str(config), "--name", "run", "--runs", str(folder / "runs")]
        return [*start_words, "--ckpt_path", str(checkpoint)]

    assert main(on(tmp_path / "one")) == 0
    assert wait(start(hosts, lambda _: on(tmp_path / "two"), tmp_path), SECONDS) == [0, 0]
    one, two = (
        next(csv.DictReader((tmp_path / name / "runs" / "run" / "test" / "metrics.csv").open()))
        for name in ("one", "two")
    )
    assert one.keys() == two.keys() and "test/audio+text->image/recall@1" in one
    for name in one:
        assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-6), name


def test_a_node_that_cannot_see_the_checkpoint_ends_the_run(
    config: Path, alone: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Beside a rank in the middle of a run it would have begun at step 0, without a word."""
    disks = [tmp_path / "disk0", tmp_path / "disk1"]

    def on(node: int) -> list[str]:
        return words(config, disks[node], "--resume", "auto")

    def give(disk: Path) -> None:
        there = disk / "runs" / "run" / "checkpoints"
        there.mkdir(parents=True)
        shutil.copy(alone / "runs" / "run" / "checkpoints" / "epoch=0-step=3.ckpt", there)

    give(disks[0])
    assert wait(start(hosts, on, tmp_path / "refused"), SECONDS) == [2, 2]
    said = [(tmp_path / "refused" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "rank 0 starts from epoch=0-step=3.ckpt of " in said[0] and "not so rank 1" in said[0]
    assert "rank 1 starts from no checkpoint, not so rank 0" in said[1] and "where all nodes see it" in said[1]
    give(disks[1])
    assert wait(start(hosts, on, tmp_path / "resumed"), SECONDS) == [0, 0]
    for rank in (0, 1):
        shutil.move(disks[rank] / f"rank{rank}.jsonl", tmp_path)
    assert read_keys(tmp_path, 2) == read_keys(alone, 1)[3:]
    assert difference(disks[0], alone) < 1e-6


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["--model.init_args.lr", "1e-4"], "has another 'model' than rank"),
        (["--data.seed", "7"], "has another 'data' than rank"),
        (["--checkpoint.every_n_train_steps", "2"], "has another 'checkpoint' than rank"),
        (["--checkpoint_minutes", "0"], "has another 'checkpoint_minutes' than rank"),
        (["--trainer.callbacks+", "LearningRateMonitor"], "has another 'trainer.callbacks' than rank"),
        (["--data.path", "ELSEWHERE"], "has another 'contents of the shards' than rank"),
    ],
)
def test_nodes_with_different_configs_or_shards_end_the_run(
    other: list[str], message: str, config: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    elsewhere = write_tiny_shards(tmp_path / "elsewhere", {"train": (20, 29), "val": (20,), "test": (4,)})
    other = [str(elsewhere) if word == "ELSEWHERE" else word for word in other]

    def on(node: int) -> list[str]:
        return words(config, tmp_path, *(other if node else []))

    processes = start(hosts, on, tmp_path)
    assert wait(processes, SECONDS) == [2, 2]
    assert all(message in process.output.read_text() for process in processes)


@pytest.mark.parametrize("lacks", [0, 1])
@pytest.mark.parametrize("launcher", [as_torchrun, as_srun])
def test_a_node_that_cannot_start_ends_the_others_at_once(
    launcher: Any, lacks: int, config: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """Without it they wait for the process group, half an hour."""

    def on(node: int) -> list[str]:
        return words(config, tmp_path, *(["--data.path", "nowhere"] if node == lacks else []))

    processes = start(hosts, on, tmp_path, launcher)
    assert wait(processes, 20) == [2, 2]
    said = [process.output.read_text() for process in processes]
    assert "no index.json [nowhere]" in said[lacks] and "cannot start" not in said[lacks]
    assert f"mmrep: error: rank {lacks} cannot start: no index.json [nowhere]" in said[1 - lacks]
    assert not (tmp_path / "runs").exists()


def test_all_nodes_with_the_same_mistake_say_it_and_end(config: Path, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    def on(node: int) -> list[str]:
        return words(config, tmp_path, "--model.init_args.lrr", "1")

    processes = start(hosts, on, tmp_path)
    assert wait(processes, 20) == [2, 2]
    assert all("did you mean 'lr'?" in process.output.read_text() for process in processes)


def test_a_config_that_one_node_lacks_ends_the_others_at_once(
    config: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    processes = start(hosts, lambda node: words(tmp_path / "no.yaml" if node else config, tmp_path), tmp_path)
    assert wait(processes, 20) == [2, 2]
    assert "rank 1 cannot start: no such config file" in processes[0].output.read_text()


def test_a_node_that_was_not_started_is_missed_after_a_time(
    config: Path, hosts: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", 0.5)

    def on(node: int) -> list[str]:
        return words(config, tmp_path, "--hang_after", "3")

    tmp_path.joinpath("out").mkdir()
    given = as_torchrun(hosts, 0, 0)
    process = hosts[0].fork(command(on(0), 0), tmp_path / "out" / "rank0.txt", given)
    assert wait([process], 20) == [2]
    said = process.output.read_text()
    assert said.count("mmrep: 1 of 2 processes started by torchrun; waiting for the others") == 1
    assert "mmrep: error: 1 of 2 processes started within 3 s" in said


def test_without_the_first_node_the_others_end_after_a_time(
    config: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = command(words(config, folder, "--hang_after", "2"), 1)
    process = hosts[1].fork(run, tmp_path / "rank1.txt", as_torchrun(hosts, 1, 0))
    assert wait([process], 30) == [2]
    assert "mmrep: error: rank 0 has not started, or is gone; see what it says itself" in process.output.read_text()


@pytest.mark.slow
def test_started_again_by_torchrun_the_run_goes_on(
    config: Path, alone: Path, hosts: tuple[Host, Host], tmp_path: Path
) -> None:
    """``--resume auto`` is there from the first start, when there is nothing to go on from; a rank dies in the middle."""
    die = "{class_path: tests.multi_node.record.Die, init_args: {step: 4, rank: 1}}"

    def on(node: int) -> list[str]:
        return words(config, tmp_path, "--resume", "auto", "--trainer.callbacks+", die)

    first = start(hosts, on, tmp_path / "first")
    codes = wait(first, SECONDS)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert wait(start(hosts, on, tmp_path / "second", restarts=1), SECONDS) == [0, 0]
    keys = read_keys(alone, 1)
    assert read_keys(tmp_path, 2) == [*keys[:5], *keys[3:]]  # the checkpoint is that of the first epoch's end
    assert difference(tmp_path, alone) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("namespaces", [None, False])
def test_a_cut_line_ends_the_run_within_the_bound(
    namespaces: bool | None, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of --hang_after, and what the watchdog grants a rank whose store does not answer, here less than in earnest."""
    monkeypatch.setattr(watchdog, "WAY_OUT", 3.0)

    def on(node: int) -> list[str]:
        return words(config, tmp_path, "--trainer.max_epochs", "500", "--hang_after", "8")

    with two_hosts(namespaces) as both:
        processes = start(both, on, tmp_path)
        while not (tmp_path / "rank0.jsonl").exists() or len((tmp_path / "rank0.jsonl").read_text().splitlines()) < 6:
            assert all(process.poll() is None for process in processes), processes[0].output.read_text()
            time.sleep(0.1)
        both[1].cut()
        began = time.monotonic()
        living = processes if both[1].namespace else processes[:1]
        assert all(code != 0 for code in wait(living, 60))
        assert time.monotonic() - began < 40
        assert "mmrep: error: rank 1 " in processes[0].output.read_text()
    assert (tmp_path / "runs" / "run" / "checkpoints" / "last.ckpt").exists()
