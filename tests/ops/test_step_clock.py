"""The clock of a step: golden sums with a time of the test's own, nesting, a GPU's late answers, marks in a backward pass."""

from __future__ import annotations

import pytest
import torch

from mmrep.ops.gather import row_counts, sum_over_ranks
from mmrep.ops.step_clock import (
    CHECKPOINT,
    COMMUNICATION,
    DATA,
    ENCODERS_BACKWARD,
    ENCODERS_FORWARD,
    LOSS_BACKWARD,
    LOSS_FORWARD,
    PARTS,
    REST,
    VALIDATION,
    StepClock,
    mark_backward,
    running,
    timed,
)
from tests.gloo_pool import GlooPool


class Hand:
    """A time that moves when the test says so; moments after ``known`` are not answered, as on a GPU that is behind."""

    def __init__(self) -> None:
        self.time, self.known, self.asked = 0.0, float("inf"), 0

    def now(self) -> float:
        self.asked += 1
        return self.time

    def seconds(self, start: float, end: float) -> float | None:
        return end - start if end <= self.known else None

    def wait(self) -> None:
        self.known = float("inf")


def spent(clock: StepClock) -> dict[str, float]:
    return {part: seconds for part, seconds in clock.seconds().items() if seconds}


def test_time_goes_to_the_innermost_part_and_adds_up() -> None:
    hand = Hand()
    clock = StepClock(hand)
    hand.time += 1  # rest
    clock.enter(DATA)
    hand.time += 2
    clock.leave()
    clock.enter(LOSS_FORWARD)
    hand.time += 4
    clock.enter(COMMUNICATION)
    hand.time += 8
    clock.leave()
    hand.time += 16
    clock.leave()
    hand.time += 32  # rest
    assert spent(clock) == {REST: 33, DATA: 2, LOSS_FORWARD: 20, COMMUNICATION: 8}
    assert sum(clock.seconds().values()) == hand.time == 63 and tuple(clock.seconds()) == PARTS
    clock.reset()
    hand.time += 5
    assert spent(clock) == {REST: 5}


def test_switch_replaces_the_part_that_runs() -> None:
    hand = Hand()
    clock = StepClock(hand)
    clock.enter(LOSS_BACKWARD)
    hand.time += 1
    clock.switch(ENCODERS_BACKWARD)
    hand.time += 2
    clock.switch(COMMUNICATION)
    hand.time += 4
    clock.leave()
    hand.time += 8
    assert spent(clock) == {LOSS_BACKWARD: 1, ENCODERS_BACKWARD: 2, COMMUNICATION: 4, REST: 8}


def test_validation_keeps_all_that_happens_inside() -> None:
    hand = Hand()
    clock = StepClock(hand)
    clock.enter(VALIDATION)
    clock.enter(COMMUNICATION)
    hand.time += 1
    clock.switch(DATA)
    hand.time += 2
    clock.leave()
    hand.time += 4
    clock.leave()
    hand.time += 8
    assert spent(clock) == {VALIDATION: 7, REST: 8}


def test_a_checkpoint_inside_a_validation_is_a_checkpoint_with_all_that_happens_inside() -> None:
    hand = Hand()
    clock = StepClock(hand)
    clock.enter(VALIDATION)
    hand.time += 1
    clock.enter(CHECKPOINT)
    hand.time += 2
    clock.enter(COMMUNICATION)
    hand.time += 4
    clock.switch(DATA)
    hand.time += 8
    clock.leave()
    clock.leave()
    hand.time += 16
    clock.leave()
    hand.time += 32
    assert spent(clock) == {VALIDATION: 17, CHECKPOINT: 14, REST: 32}


def test_what_a_gpu_has_not_reached_is_counted_later_and_once() -> None:
    hand = Hand()
    clock = StepClock(hand)
    clock.enter(DATA)
    hand.time = 3.0
    clock.leave()
    hand.time, hand.known = 5.0, 4.0
    assert spent(clock) == {DATA: 3}
    assert spent(clock) == {DATA: 3}
    assert {part: s for part, s in clock.seconds(wait=True).items() if s} == {DATA: 3, REST: 2}


def test_entering_the_part_that_runs_asks_for_no_moment() -> None:
    hand = Hand()
    clock, before = StepClock(hand), hand.asked
    for _ in range(3):
        clock.enter(REST)
        clock.leave()
    assert hand.asked == before


@timed(DATA)
def _broken(hand: Hand) -> None:
    hand.time += 1
    raise ValueError("broken")


def test_marks_do_nothing_without_a_clock_and_close_on_an_error() -> None:
    with timed(DATA):
        pass
    hand = Hand()
    with running(StepClock(hand)) as clock:
        with pytest.raises(ValueError, match="broken"):
            _broken(hand)
        hand.time += 2
    with timed(DATA):
        hand.time += 4
    assert spent(clock) == {DATA: 1, REST: 6}


class Timed(torch.autograd.Function):
    """Lets time pass in its backward pass."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor, hand: Hand, seconds: float) -> torch.Tensor:
        ctx.hand, ctx.passing = hand, seconds  # type: ignore[attr-defined]
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        ctx.hand.time += ctx.passing  # type: ignore[attr-defined]
        return grads[0] * 2, None, None


def test_the_loss_backward_ends_where_the_gradients_of_the_rows_arrive() -> None:
    hand = Hand()
    with running(StepClock(hand)) as clock:
        leaves = {name: torch.ones(3, requires_grad=True) for name in ("image", "text")}
        rows = {name: Timed.apply(leaf, hand, 10.0) for name, leaf in leaves.items()}
        rows["frozen"] = torch.ones(3)
        mark_backward(rows, several_ranks=True)
        loss = Timed.apply(rows["image"] * rows["text"], hand, 1.0).sum() + Timed.apply(rows["text"], hand, 2.0).sum()
        clock.enter(LOSS_BACKWARD)
        loss.backward()
        hand.time += 100.0  # as DDP's waiting, which ends the backward pass
        clock.leave()
    assert spent(clock) == {LOSS_BACKWARD: 3, ENCODERS_BACKWARD: 20, COMMUNICATION: 100}
    assert leaves["image"].grad is not None and leaves["image"].grad.tolist() == [8.0] * 3


def _collectives(rank: int) -> tuple[dict[str, float], list[int]]:
    with running(StepClock()) as clock, timed(LOSS_FORWARD):
        counts = row_counts(rank + 1, torch.device("cpu"))
        total = float(sum_over_ranks(torch.ones(1)))
    return clock.seconds(), [*counts, round(total)]


def test_collectives_are_communication_and_none_with_one_rank(pool2: GlooPool) -> None:
    for seconds, values in pool2.run(_collectives, [(0,), (1,)]):
        assert values == [1, 2, 2] and seconds[COMMUNICATION] > 0 and seconds[ENCODERS_FORWARD] == 0
    seconds, values = _collectives(0)
    assert values == [1, 1] and seconds[COMMUNICATION] == 0 and seconds[LOSS_FORWARD] > 0
