"""The report over the ranks: golden numbers, and the table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmrep.modules.monitoring.throughput_report import lines, peak_memory, throughput
from mmrep.ops.step_clock import CHECKPOINT, COMMUNICATION, DATA, ENCODERS_FORWARD, PARTS, REST, VALIDATION

SECONDS = {
    **{part: [0.0, 0.0] for part in PARTS},
    DATA: [1.0, 3.0],
    ENCODERS_FORWARD: [4.0, 4.0],
    COMMUNICATION: [2.0, 0.0],
    VALIDATION: [2.0, 2.0],
    CHECKPOINT: [1.0, 1.0],
}


def test_shares_are_means_over_ranks_and_rates_are_of_training() -> None:
    report = throughput(SECONDS, [70, 50], steps=6, warmup_steps=5)
    assert report["wall_seconds"] == 10 and report["training_seconds"] == 7 and report["samples"] == 120
    assert report["samples_per_second"] == pytest.approx(120 / 7) and report["steps_per_second"] == pytest.approx(6 / 7)
    assert report["shares"][DATA] == pytest.approx(0.2) and report["shares"][COMMUNICATION] == pytest.approx(0.1)
    assert report["shares"][REST] == 0 and sum(report["shares"].values()) == pytest.approx(1)
    assert report["seconds"][DATA] == [1.0, 3.0]


def test_the_table_names_the_ranks_with_the_least_and_the_most() -> None:
    report = throughput(SECONDS, [70, 50], steps=6, warmup_steps=5)
    report["peak_memory_bytes"] = {"host": [3 << 30, 1 << 30], "cuda": [0, 0]}
    head, titles, *body = lines(report).splitlines()
    assert head.startswith("throughput: 17.1 samples/s, 0.86 steps/s on 2 ranks (6 steps, the first 5 left out)")
    assert titles.split() == ["mean", "least", "(rank)", "most", "(rank)"]
    rows = {line[2:22].strip(): line[22:].split() for line in body}
    assert rows["data"] == ["20.0", "%", "10.0", "%", "(0)", "30.0", "%", "(1)"]
    assert rows["peak memory, host"] == ["2.00", "GiB", "1.00", "GiB", "(1)", "3.00", "GiB", "(0)"]
    assert "peak memory, cuda" not in rows and len({len(line) for line in (titles, *body)}) == 1


def test_a_run_of_no_step_has_a_report() -> None:
    report = throughput({part: [0.0] for part in PARTS}, [0], steps=0, warmup_steps=0)
    assert report["samples_per_second"] is None and set(report["shares"].values()) == {0.0}
    assert "no step was timed" in lines({**report, "peak_memory_bytes": peak_memory_lists()})


def peak_memory_lists() -> dict[str, list[int]]:
    return {name: [value] for name, value in peak_memory().items()}


def test_peak_memory_is_that_of_the_process() -> None:
    before = peak_memory()["host"]
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    held = bytearray(before - now + (256 << 20))  # passes the peak so far by 256 MiB
    held[:: 1 << 12] = b"1" * len(held[:: 1 << 12])  # every page
    assert before + (200 << 20) < peak_memory()["host"] < before + (400 << 20)
