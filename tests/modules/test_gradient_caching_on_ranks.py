"""Batches in parts, trained through the command line: two ranks and one process end with the weights of whole batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launched import read
from tests.modules.fault_tolerance.running import fit, weights, write_config


def train(folder: Path, shards: Path, world: int, *options: str) -> Path:
    write_config(folder, shards, trainer__precision="64-true")
    ranks = fit(folder, *options, world=world)
    assert ranks.codes == [0] * world, ranks.text()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """In one process, without parts."""
    return train(tmp_path_factory.mktemp("whole"), tiny_shards, 1)


@pytest.mark.parametrize(
    ("world", "parts"),
    [
        (1, ["--model.init_args.micro_batch_size", "3"]),
        (2, []),
        (2, ["--model.init_args.micro_batch_size", "1"]),
        (2, ["--model.init_args.micro_batch_size", "3", "--model.init_args.kept_micro_batches", "1"]),
    ],
)
def test_parts_and_ranks_change_no_weight(
    world: int, parts: list[str], whole: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    """18 steps of 8 samples by AdamW in fp64."""
    train(tmp_path, tiny_shards, world, *parts)
    assert read(tmp_path / "seen", world) == read(whole / "seen", 1)
    found, expected = weights(tmp_path), weights(whole)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).abs().max()) < 1e-6, name
