"""Training over two hosts with an address and a disk each: as one process, and no rank alone with what it believes."""

from __future__ import annotations

import copy
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import mmrep
from mmrep.cli import main
from mmrep.data.index import Index
from tests.data.server import served
from tests.multi_node.hosts import Host, two_hosts, wait
from tests.multi_node.launching import as_srun, as_torchrun, start
from tests.multi_node.record import read_keys
from tests.test_cli import CONFIG

SECONDS = 90
HTTP = 8123


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Two epochs of AdamW in fp64: it moves a weight by a whole step whatever the size of its gradient, rounding included."""
    content: dict[str, Any] = copy.deepcopy(CONFIG)
    content["model"]["init_args"]["encoders"]["audio"]["init_args"]["augment"] = False  # its noise is drawn by rank
    content["data"]["path"] = str(tiny_shards)
    content["trainer"] |= {"precision": "64-true", "max_epochs": 2}
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
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], dict[str, Tensor]]:
    """Samples and weights of the run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert main(words(config, folder)) == 0
    return read_keys(folder, 1), weights(folder)


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(folder / "runs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    return {name: value for name, value in checkpoint["state_dict"].items() if value.is_floating_point()}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
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
    namespaces: bool | None, per_node: int, config: Path, alone: Any, tiny_shards: Path, tmp_path: Path
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
    keys, expected = alone
    assert read_keys(tmp_path, 2 * per_node) == keys
    assert farthest(expected, weights(disks[0])) < 1e-6
    assert mmrep.load(disks[0] / "runs" / "run").encode(text=["a red thing"])["text"].shape == (1, 16)
    assert {path.name for path in (disks[0] / "runs" / "run").iterdir()} >= {"config.yaml", "metrics.csv", "model"}
    saved = yaml.safe_load((disks[0] / "runs" / "run" / "config.yaml").read_text())
    assert saved["trainer"]["devices"] == "auto" and saved["trainer"]["num_nodes"] == 1  # it runs anywhere
    assert not (disks[1] / "runs").exists()
    trained_on = {shard.sha256 for shard in Index.load(tiny_shards).shards if not shard.name.startswith("test")}
    for disk in disks:  # every node has every shard of train and val
        assert trained_on <= {path.stem for path in (disk / "cache").glob("*.tar")}
