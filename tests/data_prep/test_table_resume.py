"""A run of `data_prep.table` that is killed goes on where it stopped, and comes to the same bytes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from data_prep.building.build_folder import BuildFolder
from data_prep.table import main
from data_prep.table.pack import Packer
from data_prep.table.plan import Plan
from data_prep.table.spool import Spool
from mmrep.errors import ConfigError, DataError
from tests.data_prep.failing_files import fail_to_open
from tests.data_prep.test_table import write_table
from tests.full_disk import errno_within
from tests.killed import ended, forked
from tests.ray_session import local_ray  # noqa: F401 - a fixture
from tests.tiny import file_bytes, png

OPTIONS = ["--image", "photo", "--text", "caption", "--samples-per-shard", "3", "--max-rejects", "0.2"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Sixty rows with pictures, one of them broken."""
    for n in range(60):
        (tmp_path / f"{n}.png").write_bytes(png((n, n, n), noise=n, size=64) if n != 7 else b"no picture")
    return write_table(tmp_path / "t.csv", [{"photo": f"{n}.png", "caption": f"text {n}"} for n in range(60)])


def command(table: Path, out: Path, workers: int = 2, *more: str) -> list[str]:
    return ["--table", str(table), "--out", str(out), "--workers", str(workers), *OPTIONS, *more]


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments(table: Path, tmp_path: Path, workers: int) -> None:
    assert main(command(table, tmp_path / "expected", workers)) == 0
    start = time.monotonic()
    assert main(command(table, tmp_path / "timed", workers)) == 0
    took, rng, out = time.monotonic() - start, random.Random(workers), tmp_path / "out"
    for _ in range(8):
        process = forked(lambda: main(command(table, out, workers)), tmp_path / "log")
        assert ended(process, rng.uniform(0, 0.8 * took), signal.SIGKILL) in (-signal.SIGKILL, 0)
        if out.exists():
            break
    if not out.exists():
        assert main(command(table, out, workers)) == 0
    assert file_bytes(out) == file_bytes(tmp_path / "expected") and not (tmp_path / "out.part").exists()


def test_a_worker_that_is_killed_loses_only_its_shard(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(table, tmp_path / "expected")) == 0
    out, log = tmp_path / "out", tmp_path / "log"
    process = forked(lambda: slowed(0.05, command(table, out)), log)
    records = tmp_path / "out.part" / "unfinished"
    while len(list(records.glob("*.tar.json"))) < 4:
        time.sleep(0.01)
    os.kill(children(process)[0], signal.SIGKILL)
    assert ended(process) == 2
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert line.startswith("error: a worker process was killed; run the same again: what is finished is kept")
    there = len(list(records.glob("*.tar.json")))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.part").glob("*.tar")}
    capsys.readouterr()
    assert main(command(table, out)) == 0
    shards = len(list(out.glob("*.tar")))
    assert f"{there} of {shards} shards were there" in capsys.readouterr().err and 4 <= there < shards
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times, "done once"
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


def slowed(seconds: float, words: list[str]) -> int:
    pack = Packer.__call__

    def slowly(self: Packer, name: str) -> str:
        time.sleep(seconds)
        return pack(self, name)

    Packer.__call__ = slowly  # type: ignore[method-assign]  # only in a fork
    return main(words)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_ends_it_at_once_with_a_message_and_the_workers_too(table: Path, tmp_path: Path, workers: int) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = forked(lambda: slowed(0.2, command(table, out, workers)), log)
    while not list((tmp_path / "out.part" / "unfinished").glob("*.tar.json")):
        time.sleep(0.01)
    below, start = children(process), time.monotonic()
    assert len(below) == (workers if workers > 1 else 0)
    assert ended(process, 0, signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 5
    assert log.read_text().splitlines()[-1] == "stopped by SIGTERM; finished shards are kept, the same command goes on"
    assert not any(Path(f"/proc/{child}").exists() for child in below)
    assert main(command(table, out, workers)) == 0


def test_workers_of_a_killed_run_end_by_themselves(table: Path, tmp_path: Path) -> None:
    process = forked(lambda: slowed(0.2, command(table, tmp_path / "out")), tmp_path / "log")
    while len(below := children(process)) < 2:
        time.sleep(0.01)
    ended(process, 0, signal.SIGKILL)
    end = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() and "Z" not in state(child) for child in below):
        assert time.monotonic() < end
        time.sleep(0.05)


def state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def interrupted(table: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends in the middle."""
    pack, done = Packer.__call__, []

    def breaks(self: Packer, name: str) -> str:
        if len(done) == 5:
            raise OSError("no room")
        done.append(name)
        return pack(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Packer, "__call__", breaks)
        assert main(command(table, out, 1)) == 2
    assert len(list(out.with_name("out.part").glob("*.tar"))) == 5 and not out.exists()


def test_another_table_or_another_request_is_refused_or_begun_anew(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    interrupted(table, out, monkeypatch)
    before = file_bytes(tmp_path / "out.part")
    for more, what in (
        (["--seed", "1"], "seed"),
        (["--image-size", "9"], "image_size"),
        (["--text", "photo"], "sources"),
    ):
        words = [word for word in command(table, out, 1) if more[0] != "--text" or word not in ("--text", "caption")]
        assert main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert f"an interrupted run was asked for something else (another {what})" in error.splitlines()[-1]
        assert file_bytes(tmp_path / "out.part") == before
    table.write_text(table.read_text() + "8.png,one more\n")
    assert main(command(table, out, 1)) == 2
    assert "(another table)" in capsys.readouterr().err and file_bytes(tmp_path / "out.part") == before
    assert main(command(table, out, 1, "--overwrite")) == 0
    assert "shards were there" not in capsys.readouterr().err
    assert main(command(table, tmp_path / "expected", 1)) == 0
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


def test_a_damaged_shard_is_made_anew(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(table, tmp_path / "expected", 1)) == 0
    interrupted(table, tmp_path / "out", monkeypatch)
    first, second, third, *_ = sorted((tmp_path / "out.part").glob("*.tar"))
    first.write_bytes(first.read_bytes()[:-512])
    second.unlink()
    whole = bytearray(third.read_bytes())
    whole[700] ^= 1
    third.write_bytes(whole)
    capsys.readouterr()
    assert main(command(table, tmp_path / "out", 1)) == 0
    assert "2 of 22 shards were there" in capsys.readouterr().err
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_an_interrupted_overwrite_goes_on_and_keeps_what_was_there_till_the_end(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(command(table, out, 1)) == 0
    before = file_bytes(out)
    pack = Packer.__call__

    def breaks(self: Packer, name: str) -> str:
        if name.startswith("val"):
            raise OSError("no room")
        return pack(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Packer, "__call__", breaks)
        assert main(command(table, out, 1, "--seed", "5", "--overwrite")) == 2
    assert file_bytes(out) == before
    assert main(command(table, out, 1, "--seed", "5", "--overwrite")) == 0
    assert main(command(table, tmp_path / "expected", 1, "--seed", "5")) == 0
    assert file_bytes(out) == file_bytes(tmp_path / "expected")


def test_two_runs_do_not_build_at_once(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_prep.building.lock.SECONDS_FOR_ORPHANS", 0.2)
    process = forked(lambda: slowed(0.2, command(table, tmp_path / "out", 1)), tmp_path / "log")
    while not list((tmp_path / "out.part" / "unfinished").glob("*.tar.json")):
        time.sleep(0.01)
    assert main(command(table, tmp_path / "out", 1)) == 2
    assert "another run is building here" in capsys.readouterr().err
    assert ended(process) == 0, "and it is not disturbed"


@pytest.mark.usefixtures("local_ray")
def test_ray_writes_the_same_bytes_and_goes_on(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(table, tmp_path / "expected")) == 0
    interrupted(table, tmp_path / "out", monkeypatch)
    capsys.readouterr()
    assert main(command(table, tmp_path / "out", 1, "--engine", "ray", "--concurrency", "1")) == 0
    assert "5 of 22 shards were there" in capsys.readouterr().err
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_a_table_that_changes_while_it_is_read(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack = Packer.__call__

    def changes(self: Packer, name: str) -> str:
        os.utime(table, (1, 1))
        return pack(self, name)

    monkeypatch.setattr(Packer, "__call__", changes)
    assert main(command(table, tmp_path / "out", 1)) == 2
    assert "the table changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_ray_that_is_not_reached_or_too_small_loses_nothing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    interrupted(table, out, monkeypatch)
    before = file_bytes(tmp_path / "out.part")
    with monkeypatch.context() as patch:
        patch.setattr("ray.is_initialized", lambda: False)  # that of other tests
        assert main(command(table, out, 1, "--engine", "ray", "--ray-address", "127.0.0.1:1")) == 2
    assert "no Ray at" in capsys.readouterr().err and file_bytes(tmp_path / "out.part") == before
    for error in (DataError("a Ray worker died 3 times"), ConfigError("the Ray cluster has 0 CPUs")):
        monkeypatch.setattr("data_prep.table.command.map_shards", Mock(side_effect=error))
        assert main(command(table, out, 1, "--engine", "ray")) == 2
        assert error.what in capsys.readouterr().err and file_bytes(tmp_path / "out.part") == before


def test_what_a_table_can_never_come_to_is_given_up(table: Path, tmp_path: Path) -> None:
    assert main(command(table, tmp_path / "out", 1, "--max-rejects", "0")) == 2
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize(("code", "workers"), [(errno.ESTALE, 1), (errno.EIO, 2), (errno.ETIMEDOUT, 1)])
def test_a_file_system_that_is_away_makes_no_reject(
    code: int, workers: int, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row is in the result once the file system is back; one line tells it before."""
    assert main(command(table, tmp_path / "expected", 1)) == 0
    with pytest.MonkeyPatch.context() as patch:
        fail_to_open(patch, "30.png", code)
        capsys.readouterr()
        assert main(command(table, tmp_path / "out", workers)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: [Errno {code}]") and "30.png" in line
    assert line.endswith("; finished shards are kept, the same command goes on")
    there = len(list((tmp_path / "out.part" / "unfinished").glob("*.tar.json")))
    assert main(command(table, tmp_path / "out", workers)) == 0
    assert there and f"{there} of 22 shards were there" in capsys.readouterr().err
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_a_file_that_may_not_be_read_is_a_reject(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_open(monkeypatch, "30.png", errno.EACCES)
    assert main(command(table, tmp_path / "out", 1)) == 0
    assert "32,photo,30.png,cannot be read (Permission denied)" in (tmp_path / "out" / "rejects.csv").read_text()


def test_a_copy_of_the_table_that_cannot_be_read_for_a_while_is_not_called_broken(tmp_path: Path) -> None:
    spool = Spool([tmp_path / "t.sqlite"], ["t"], ["a"])
    (tmp_path / "t.sqlite").mkdir()  # which SQLite can open and not read
    with pytest.raises(OSError, match="disk I/O error"):
        spool.row(0, 0, 0)
    (tmp_path / "t.sqlite").rmdir()
    (tmp_path / "t.sqlite").write_bytes(b"")
    with pytest.raises(DataError, match="a broken copy"):
        spool.row(0, 0, 0)


def test_what_a_broken_copy_of_the_table_asks_for_helps(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(table, tmp_path / "out", monkeypatch)
    (tmp_path / "out.part" / "unfinished" / "table-000000.sqlite").write_bytes(b"no SQLite at all")
    capsys.readouterr()
    assert main(command(table, tmp_path / "out", 1, "--overwrite")) == 2
    assert f"remove {tmp_path / 'out.part'}, and run it again" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out.part")
    assert main(command(table, tmp_path / "out", 1)) == 0


def test_a_kill_between_building_and_the_end_costs_nothing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command ends with 0: a supervisor starts it again."""
    assert main(command(table, tmp_path / "expected", 1)) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(BuildFolder, "_put_in_place", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(command(table, out, 1))
    monkeypatch.setattr(Packer, "__call__", Mock(side_effect=AssertionError("made anew")))
    capsys.readouterr()
    assert main(command(table, out, 1)) == 0
    assert capsys.readouterr().out.startswith("the result is in place")
    assert file_bytes(out) == file_bytes(tmp_path / "expected")
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("content", [b"", b'{"shards": [{"name"', b"[]", b"\0\0"])
def test_a_damaged_plan_or_record_is_made_anew(
    content: bytes, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a loss of power leaves it."""
    assert main(command(table, tmp_path / "expected", 1)) == 0
    interrupted(table, tmp_path / "out", monkeypatch)
    work = tmp_path / "out.part" / "unfinished"
    for path in (work / "plan.json", work / "rows.npy", min(work.glob("*.tar.json"))):
        path.write_bytes(content)
    capsys.readouterr()
    assert main(command(table, tmp_path / "out", 1)) == 0
    assert "4 of 22 shards were there" in capsys.readouterr().err
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def test_rows_that_were_cut_are_planned_anew(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(command(table, tmp_path / "expected", 1)) == 0
    interrupted(table, tmp_path / "out", monkeypatch)
    rows = tmp_path / "out.part" / "unfinished" / "rows.npy"
    rows.write_bytes(rows.read_bytes()[:-8])
    assert main(command(table, tmp_path / "out", 1)) == 0
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


@pytest.mark.parametrize("length", [500, 6000])
def test_a_full_disk_cuts_no_plan(length: int, tmp_path: Path) -> None:
    plan, rows = Plan([], length, [], 0), np.arange(length)
    assert errno_within(4096, lambda: plan.save(tmp_path, rows), tmp_path / "log") == errno.EFBIG
    assert Plan.load(tmp_path) is None
    plan.save(tmp_path, rows)
    assert Plan.load(tmp_path) == plan
