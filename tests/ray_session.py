"""One Ray for all tests: starting it takes ten seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmrep.ray_engine import LOCAL, ray_session


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray on this machine with two CPUs; what runs in a test finds it started."""
    with ray_session(LOCAL, num_cpus=2):
        yield
