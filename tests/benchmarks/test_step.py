"""The benchmark of a training step: all sides make the same steps, and the result has its gates. Its times are not tested."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step

RESULT = Path(__file__).parents[2] / step.RESULT


@pytest.fixture(scope="module")
def run() -> step.Run:
    """More steps than one cycle of log steps, past the warm-up of the learning rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "BATCH", 4)
        patch.setattr(step, "WARMUP", 3)
        patch.setattr(step, "LR", 1e-4)  # AdamW makes whole steps of rounding: at a higher rate they soon show
        return step.run_sides(7)


def test_all_sides_have_equal_losses_step_by_step(run: step.Run) -> None:
    ours, plain, theirs = (torch.tensor(run.losses[side]) for side in step.SIDES)
    assert len(ours) == 7 and (ours - ours[0]).abs().max() > 0.01, "they train"
    assert torch.equal(ours, plain)
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_every_step_is_timed_but_perhaps_the_last(run: step.Run) -> None:
    assert [len(run.seconds[side]) for side in ("plain", "open_clip")] == [7, 7] and len(run.seconds["ours"]) >= 6
    assert all(seconds > 0 for found in run.seconds.values() for seconds in found)


def test_loops_take_turns_and_only_their_own_time_counts() -> None:
    order: list[str] = []
    turns = step.Turns(["a", "b"])

    def loop(side: str, busy: int) -> None:
        for _ in turns.batches(side, [0], 3):
            order.append(side)
            sum(range(busy))

    turns.run({"a": lambda: loop("a", 10), "b": lambda: loop("b", 3_000_000)})
    assert order == ["a", "b"] * 3
    assert max(turns.seconds["a"]) < min(turns.seconds["b"])


def test_a_loop_that_fails_ends_the_others() -> None:
    turns = step.Turns(["a", "b", "c"])

    def good(batches: Iterator[Any]) -> None:
        for _ in batches:
            pass

    def bad(batches: Iterator[Any]) -> None:
        next(batches)
        raise ValueError("as asked")

    loops = {"a": good, "b": bad, "c": good}
    with pytest.raises(ValueError, match="as asked"):
        turns.run({side: lambda side=side: loops[side](turns.batches(side, [0], 5)) for side in loops})  # type: ignore[misc]
    assert threading.active_count() < 20


def test_the_typical_step_counts_log_steps_at_their_share() -> None:
    seconds = [3.0, 1.0, 1.0, 1.0, 1.0] * 3
    seconds[6] = 100.0  # one disturbed step says nothing
    assert step.typical(seconds) == pytest.approx((3 + 4 * 1) / 5)


def test_the_spread_of_ratios() -> None:
    found = step.spread([float(number) for number in range(1, 102)], [1.0] * 101)
    assert found["median"] == 51 and found["q25"] < 27 and found["q75"] > 75
    assert found["ci95_low"] == 41 and found["ci95_high"] == 61


def test_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--rounds", "3"])
    assert "--rounds 3: at least 10" in capsys.readouterr().err


def test_it_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: step.Run) -> None:
    seconds = {side: [0.1 * (1 + place)] * 21 for place, side in enumerate(step.SIDES)}
    monkeypatch.setattr(step, "run_sides", lambda steps: step.Run(seconds, run.losses))
    assert step.main(["--rounds", "10", "--out", str(tmp_path / "step.json")]) == 0
    check_result(json.loads((tmp_path / "step.json").read_text()))


def test_the_committed_result_has_the_gates() -> None:
    check_result(json.loads(RESULT.read_text()))
    assert all(row["held"] for row in json.loads(RESULT.read_text())["rows"])


def check_result(result: dict[str, Any]) -> None:
    gates = {row["theirs_is"]: row["gate"] for row in result["rows"]}
    assert gates == {"plain PyTorch loop": 1.03, "open_clip_train": 1.0}
    assert {"machine", "versions", "rounds"} <= result.keys() and result["spread"].keys() == gates.keys()
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) and row["held"] == (
            row["ratio"] <= row["gate"]
        )
        assert result["spread"][row["theirs_is"]]["ci95_low"] <= result["spread"][row["theirs_is"]]["ci95_high"]


def test_the_readme_says_what_was_measured() -> None:
    text = (RESULT.parents[2] / "README.md").read_text()
    for row in json.loads(RESULT.read_text())["rows"]:
        figures = f"{row['ours']:.3f} | {row['theirs']:.3f} | {row['theirs_is']} | {row['ratio']:.3f}"
        assert f"| {row['case']} | {row['metric']} | {figures} |" in text
