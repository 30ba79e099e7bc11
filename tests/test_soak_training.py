"""Thousands of steps hold on to nothing; and the judge of that sees what grows."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.soak import MOST_GROWTH, RESULT, growth, main, soak
from benchmarks.soak_stderr import repeated, stderr_in
from benchmarks.soak_watch import children, open_files, private_memory

ROOT = Path(__file__).parents[1]


def notes(**slopes: float) -> list[dict[str, int]]:
    """Notes over 5,000 steps of what starts at 100 MB, 50 files, 0 bytes, and grows by so much a step."""
    grows = {"memory": 0.0, "files": 0.0, "metrics": 50.0, **slopes}
    base = {"memory": 1e8, "files": 50, "metrics": 0}
    return [
        {"step": step, "processes": 3, **{name: int(base[name] + grows[name] * step) for name in base}}
        for step in range(25, 5001, 25)
    ]


@pytest.mark.parametrize(
    ("slopes", "fault"),
    [
        ({}, None),
        ({"memory": -1000.0}, None),
        ({"memory": MOST_GROWTH / 4000}, None),
        ({"memory": MOST_GROWTH / 3000}, "memory grew by 9.3 MB"),
        ({"files": 0.01}, "more files are open"),
    ],
)
def test_growth_after_the_warm_up_is_a_fault(slopes: dict[str, float], fault: str | None) -> None:
    (found,) = growth(notes(**slopes), 5000)["faults"] or [None]
    assert found is None if fault is None else fault in str(found)


def test_what_grows_in_the_warm_up_alone_is_none() -> None:
    early = [{**note, "memory": note["memory"] + min(note["step"], 1400) * 10**5} for note in notes()]
    assert growth(early, 5000)["faults"] == []


def test_a_jump_for_each_process_is_none_and_more_are() -> None:
    def jumping(*places: int) -> dict[str, Any]:
        return growth(
            [{**note, "memory": note["memory"] + 10**8 * sum(note["step"] > p for p in places)} for note in notes()],
            5000,
        )

    once = jumping(2000, 3000, 4000)
    assert once["faults"] == [] and once["jumps_bytes"] == [10**8] * 3
    assert jumping(2000, 2600, 3200, 3800)["faults"] == ["memory jumped 4 times"]
    assert "memory grew" in jumping(*range(1600, 5000, 300))["faults"][0]


def test_a_table_that_grows_faster_and_faster_is_a_fault() -> None:
    bent = [{**note, "metrics": note["step"] ** 2} for note in notes()]
    (fault,) = growth(bent, 5000)["faults"]
    assert "metrics.csv grew" in fault


@pytest.mark.parametrize("until", [0, 1500, 3000])
def test_a_table_that_does_not_grow_is_a_fault(until: int) -> None:
    still = [{**note, "metrics": min(note["metrics"], 50 * until)} for note in notes()]
    assert growth(still, 5000)["faults"] == ["metrics.csv does not grow"]


def test_steps_that_are_too_few_to_judge_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "999"])
    assert "--steps 999: give at least 1000" in capsys.readouterr().err


def test_it_counts_this_process(tmp_path: Path) -> None:
    before, held = open_files(os.getpid()), private_memory(os.getpid())
    assert held > 1e7
    with (tmp_path / "file").open("w"):
        assert open_files(os.getpid()) == before + 1
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in children(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert private_memory(child.pid) == 0 and open_files(child.pid) == 0


def test_the_page_has_the_figures_of_the_result() -> None:
    runs = json.loads((ROOT / RESULT).read_text())["runs"]
    assert [(run["ranks"], run["steps"], run["faults"], run["repeated"]) for run in runs] == [
        (1, 5000, [], {}),
        (2, 5000, [], {}),
    ]
    page = (ROOT / "docs" / "multi_node.md").read_text()
    (alone,), ranks = (run["growth"] for run in runs)

    def at(notes: list[dict[str, int]]) -> float:
        return next(note["memory"] for note in notes if note["step"] >= 1500) / 1e6

    kept = f"{alone['files']} | {alone['metrics_second_half']:.2f} | nothing |"
    once = f"| {{:+.1f}} MB of {at(runs[0]['notes'][0]):.0f} | {{:+.0f}} MB | {kept}"
    assert once.format(alone["memory_bytes"] / 1e6, alone["jumps_bytes"][0] / 1e6) in page
    most, jump = (max(rank[name] for rank in ranks) for name in ("memory_bytes", "jumps_bytes"))
    of = max(map(at, runs[1]["notes"]))
    assert f"| at most {most / 1e6:+.1f} MB of {of:.0f} | {jump[0] / 1e6:+.0f} MB | 0 |" in page
    for grown in (alone, *ranks):
        (at_once,) = grown["jumps_bytes"]
        assert grown["memory_bytes"] < 3e6 and 110e6 < at_once < 130e6
    assert "grows by less than 3 MB, and once by about 120 MB" in (ROOT / "README.md").read_text()


def held_by_all() -> int:
    """Of this process and its children, which share pages with it."""
    return sum(private_memory(process) for process in (os.getpid(), *children(os.getpid())))


def test_pages_that_a_fork_shares_are_counted_once() -> None:
    before = held_by_all()
    held = np.ones(256 << 17)  # 256 MB: what else is forked from this process gives and takes a few
    alone = held_by_all()
    ours, theirs = os.pipe()
    gc.disable()  # it would write to what is shared
    child = os.fork()
    if not child:
        os.read(ours, 1)
        os._exit(0)
    try:
        assert alone - before > 0.9 * held.nbytes
        assert private_memory(child) > 0 and abs(held_by_all() - alone) < held.nbytes / 2
    finally:
        gc.enable()
        os.write(theirs, b"x")
        os.waitpid(child, 0)
        os.close(ours)
        os.close(theirs)


def test_a_line_is_said_again_where_one_process_says_it_twice(tmp_path: Path) -> None:
    with stderr_in(tmp_path / "stderr.txt"):
        child = os.fork()
        for _ in range(1 if child else 2):
            warnings.warn_explicit("look", UserWarning, "a.py", 1, registry={})
        print("begun", end=" ", file=sys.stderr)
        print("and ended\n", file=sys.stderr)
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        os.write(2, b"from C\nfrom C\nfrom C\n")
    said = (tmp_path / "stderr.txt").read_text().splitlines()
    assert f"<process {child}> begun and ended" in said and f"<process {os.getpid()}> begun and ended" in said
    assert repeated(said, 3) == {f"<process {child}> a.py:1: UserWarning: look": 2}
    assert repeated(said, 2).keys() == {f"<process {child}> a.py:1: UserWarning: look", "from C"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_five_thousand_steps_leave_memory_and_files_where_they_were(ranks: int) -> None:
    found: dict[str, Any] = soak(ranks, 5000)
    assert found["faults"] == [], found["notes"]
    assert len(found["growth"]) == ranks and found["notes"][0][-1]["step"] > 4500
