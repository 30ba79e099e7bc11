"""The run that nothing stopped, on two ranks and in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launched import read
from tests.modules.fault_tolerance.running import STEPS, fit, write_config


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """The run that nothing stopped, on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder, tiny_shards, trainer__log_every_n_steps=1)
    ranks = fit(folder)
    assert ranks.codes == [0, 0], ranks.text()
    assert len(read(folder / "seen")) == STEPS
    return folder


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """The run that nothing stopped, of one process."""
    folder = tmp_path_factory.mktemp("alone")
    write_config(folder, tiny_shards, trainer__log_every_n_steps=1)
    assert fit(folder, world=1).codes == [0]
    return folder
