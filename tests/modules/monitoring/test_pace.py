"""Rates and time left: golden numbers with a time of the test's own."""

from __future__ import annotations

import pytest

from mmrep.modules.monitoring.pace import Pace, duration
from mmrep.ops.step_clock import CHECKPOINT, DATA, VALIDATION, StepClock
from tests.ops.test_step_clock import Hand


def step(clock: StepClock, hand: Hand, *, data: float, rest: float) -> None:
    clock.enter(DATA)
    hand.time += data
    clock.leave()
    hand.time += rest


def aside(clock: StepClock, hand: Hand, part: str, seconds: float) -> None:
    clock.enter(part)
    hand.time += seconds
    clock.leave()


def test_rate_and_share_are_of_training_and_the_time_left_has_validation_in_it() -> None:
    hand = Hand()
    clock = StepClock(hand)
    pace = Pace(clock)
    assert pace.describe(10) == {}, "nothing is known before the first batch"
    for number in range(4):
        step(clock, hand, data=0.5, rest=1.5)
        pace.batch(64, number + 1)
    assert pace.samples_per_second == pytest.approx(32) and pace.data_wait_share == pytest.approx(0.25)
    assert pace.seconds_left(10) == pytest.approx(20)
    aside(clock, hand, VALIDATION, 6.0)
    aside(clock, hand, CHECKPOINT, 2.0)
    pace.validated()
    assert pace.seconds_left(10) == pytest.approx(10 * (2 + 6 / 4))
    step(clock, hand, data=0.5, rest=1.5)
    pace.batch(64, 5)
    assert pace.samples_per_second == pytest.approx(32) and pace.data_wait_share == pytest.approx(0.25)
    assert pace.seconds_left(10) == pytest.approx(10 * (12 / 5 + 6 / 4))
    assert pace.describe(10) == {"samples/s": "32", "data wait": "25 %", "ETA": "0:00:39"}


def test_a_run_without_end_has_rates_and_no_time_left() -> None:
    hand = Hand()
    pace = Pace(StepClock(hand))
    hand.time += 0.5
    pace.batch(1, 1)
    assert pace.describe(float("inf")) == {"samples/s": "2.00", "data wait": "0 %"}


def test_rates_are_of_the_last_batches_and_begin_again_after_the_first_steps() -> None:
    hand = Hand()
    pace = Pace(StepClock(hand), window=2)
    for number, seconds in enumerate((100.0, 1.0, 1.0), start=1):
        hand.time += seconds
        pace.batch(10, number)
    assert pace.samples_per_second == pytest.approx(10) and pace.seconds_left(1) == pytest.approx(34)
    pace.begin()
    assert pace.samples_per_second == pytest.approx(10), "what is shown until there is another"
    hand.time += 2.0
    pace.batch(10, 1)
    assert pace.samples_per_second == pytest.approx(5) and pace.seconds_left(1) == pytest.approx(2)


def test_batches_that_only_accumulate_are_no_steps() -> None:
    hand = Hand()
    pace = Pace(StepClock(hand))
    for number in range(4):
        hand.time += 1.0
        pace.batch(8, (number + 1) // 2)
    assert pace.samples_per_second == pytest.approx(8) and pace.seconds_left(3) == pytest.approx(6)


def test_durations() -> None:
    assert [duration(s) for s in (0, 65, 3600 * 30 + 61)] == ["0:00:00", "0:01:05", "1 d 6:01:01"]
