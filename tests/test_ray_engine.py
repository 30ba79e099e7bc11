"""Ray as an engine: results, retries of workers that die, errors in one line. The workers import no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mmrep.errors import ConfigError, DataError, MmrepError
from mmrep.ray_engine import RaySettings, map_shards
from tests.ray_session import local_ray  # noqa: F401 - a fixture

NAMES = ["a", "b", "c", "d"]


def make(folder: Path, kind: str) -> Callable[[str], object]:
    (folder / f"made-{os.getpid()}").touch()

    def work(name: str) -> object:
        if name == "b" and kind == "dies once" and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "b" and kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "b" and kind == "away once" and not (folder / "away").exists():
            (folder / "away").touch()
            raise OSError("the file system is away")
        if kind == "sleeps":
            (folder / "asleep").touch()
            time.sleep(120)
        if name == "b" and kind == "away":
            raise OSError("the file system is away")
        if name == "b" and kind == "damaged":
            raise DataError("the shard is damaged", where=name, fix="fetch it again")
        if kind == "all damaged":
            raise DataError("the shard is damaged", where=name, fix="fetch it again")
        if name == "b" and kind == "bug":
            raise KeyError("oops")
        with (folder / "done").open("a") as file:
            file.write(f"{name}\n")
        return {"name": name, "torch": "torch" in sys.modules}

    return work


def results(folder: Path, kind: str, names: list[str] = NAMES) -> list[str]:
    found = []
    for name, result in map_shards(partial(make, folder, kind), names, RaySettings(concurrency=1)):
        assert result == {"name": name, "torch": False}
        found.append(name)
    return sorted(found)


@pytest.mark.usefixtures("local_ray")
def test_every_shard_is_done_by_workers_that_are_made_once(tmp_path: Path) -> None:
    assert results(tmp_path, "well") == NAMES
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert results(tmp_path, "well", []) == []


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_dies_is_replaced_and_its_shard_done(tmp_path: Path) -> None:
    assert results(tmp_path, "dies once") == NAMES
    assert len(list(tmp_path.glob("made-*"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_file_system_that_is_away_for_a_moment(tmp_path: Path) -> None:
    assert results(tmp_path, "away once") == NAMES


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("damaged", r"^the shard is damaged \[b\]; fetch it again$"),
        pytest.param(
            "all damaged",
            r"^4 of 4 shards failed, the first: the shard is damaged \[[abcd]\]; fetch it again$",
            marks=pytest.mark.slow,
        ),
        ("bug", r"^KeyError: 'oops' \[b\]\nTraceback"),  # a note, which only --debug shows
        pytest.param("away", r"^cannot be read or written \(the file system is away\) \[b\]$", marks=pytest.mark.slow),
    ],
)
def test_what_a_worker_raises_arrives_in_one_line_when_the_others_are_done(
    tmp_path: Path, kind: str, message: str
) -> None:
    work = map_shards(partial(make, tmp_path, kind), NAMES, RaySettings(concurrency=1))
    with pytest.raises(MmrepError, match=message) as caught:
        list(work)
    assert "\n" not in str(caught.value)
    if kind in ("damaged", "bug", "away"):
        assert (tmp_path / "done").read_text().split() == ["a", "c", "d"]


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_dies_always_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a Ray worker died 3 times .*run the same again"):
        results(tmp_path, "dies")


@pytest.mark.usefixtures("local_ray")
def test_more_than_the_cluster_has_is_refused_and_does_not_wait(tmp_path: Path) -> None:
    for settings in (RaySettings(num_cpus=64), RaySettings(num_gpus=64)):
        with pytest.raises(ConfigError, match=r"the Ray cluster has 2 CPUs and .* a worker needs .*; give smaller"):
            list(map_shards(partial(make, tmp_path, "well"), NAMES, settings))


def test_wrong_numbers_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"concurrency": 0}, {"num_cpus": 0}, {"num_gpus": -1}):
        with pytest.raises(ConfigError, match="give at least one worker"):
            RaySettings(**wrong)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--engine ray needs Ray; pip install 'mmrep\[ray\]'"):
        RaySettings()


COMMAND = """
import signal, sys
from functools import partial
from pathlib import Path
from mmrep.ray_engine import RaySettings, map_shards, ray_session
from tests.test_ray_engine import make

before = signal.getsignal(signal.SIGTERM)
try:
    with ray_session("127.0.0.1:1"):
        pass
except Exception as error:
    print(type(error).__name__, error)
print(sorted(name for name, _ in map_shards(partial(make, Path(sys.argv[1]), "well"), ["a", "b"], RaySettings())))
print(signal.getsignal(signal.SIGTERM) is before)
"""


@pytest.mark.slow
def test_a_ray_of_its_own_is_quiet_leaves_nothing_and_no_cluster_is_one_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", COMMAND, str(tmp_path)],
        **{"capture_output": True, "text": True, "env": environment, "timeout": 120},
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ConfigError no Ray at '127.0.0.1:1'"), done
    assert lines[1:] == ["['a', 'b']", "True"] and done.stderr == ""
    assert not list(home.rglob("*token*"))


SLEEPS = """
import sys
from functools import partial
from pathlib import Path
from mmrep.ray_engine import RaySettings, map_shards
from mmrep.stopping import Stopped, stopped_by_signals
from tests.test_ray_engine import make

try:
    with stopped_by_signals():
        list(map_shards(partial(make, Path(sys.argv[1]), "sleeps"), ["a", "b"], RaySettings()))
except Stopped as stop:
    print(stop.name, flush=True)
    sys.exit(stop.exit_code)
"""


@pytest.mark.slow
def test_sigterm_ends_it_and_the_ray_that_it_started(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert output == "SIGTERM\n" and process.returncode == 128 + signal.SIGTERM
    ((pid, _),) = [(int(path.name.removeprefix("made-")), path) for path in sorted(tmp_path.glob("made-*"))][:1]
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "a worker is left"
        time.sleep(0.1)
