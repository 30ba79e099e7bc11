"""Fixtures of all tests: one thread a process, small tri-modal shards, and pools of gloo processes that fork once."""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline", WANDB_SILENT="true", HF_HUB_OFFLINE="1")

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gloo_pool import GlooPool
from tests.tiny import write_tiny_shards

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU; must be set before triton is imported

torch.set_num_threads(1)  # a fork of a process that has used OpenMP threads hangs in the child


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in a Ray come last: its threads stay in this process, and a loader worker that is forked beside them may crash."""
    items.sort(key=lambda item: "local_ray" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def pool2() -> Iterator[GlooPool]:
    """Two gloo ranks."""
    with GlooPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool3() -> Iterator[GlooPool]:
    """Three gloo ranks."""
    with GlooPool(3) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[GlooPool]:
    """Four gloo ranks."""
    with GlooPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 48 + 20 + 20 samples with image, text and audio of six classes; read only."""
    return write_tiny_shards(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


def read_json(path: Path) -> dict[str, object]:
    """The content of a JSON file that is an object."""
    content: dict[str, object] = json.loads(path.read_text())
    return content
