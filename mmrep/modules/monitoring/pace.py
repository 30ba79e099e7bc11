"""`Pace`: how fast a run is now, and when it will be over."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mmrep.ops.step_clock import CHECKPOINT, DATA, VALIDATION, StepClock

WINDOW = 20
"""Batches over which the rates are taken."""


@dataclass(frozen=True)
class Mark:
    """Sums since the pace began: samples, steps, seconds of training, and of these the seconds without a batch."""

    samples: int
    steps: int
    training: float
    data: float


class Pace:
    """Rates over the last batches, and the time left.

    The rates are those of training: time of validation and of writing checkpoints is in none of them. The time left holds
    both: as much validation for each step to come as there was for each step up to the last one.

    Args:
        clock: Runs through the training.
        window: Batches over which the rates are taken.
    """

    def __init__(self, clock: StepClock, window: int = WINDOW) -> None:
        self.clock = clock
        self._marks: deque[Mark] = deque(maxlen=window + 1)
        self._rates: tuple[float, float] | None = None
        self._step: float | None = None  # seconds of a step, the mean, with checkpoints and without validation
        self._validation = 0.0  # seconds of validation for each step
        self.begin()

    def begin(self) -> None:
        """Forget what was, as that of the first steps is no pace of the run. The clock begins anew.

        The rates are the earlier ones until the next batch is done.
        """
        self.clock.reset()
        self._marks.clear()
        self._marks.append(Mark(0, 0, 0.0, 0.0))

    def batch(self, samples: int, steps: int) -> None:
        """A batch is done.

        Args:
            samples: Of it, over all ranks.
            steps: Optimiser steps since `begin`.
        """
        seconds, last = self.clock.seconds(), self._marks[-1]
        training = sum(seconds.values()) - seconds[VALIDATION] - seconds[CHECKPOINT]
        mark = Mark(last.samples + samples, steps, training, seconds[DATA])
        self._marks.append(mark)
        first = self._marks[0]
        if steps:
            self._step = (training + seconds[CHECKPOINT]) / steps
        if (passed := mark.training - first.training) > 0:
            self._rates = ((mark.samples - first.samples) / passed, (mark.data - first.data) / passed)

    def validated(self) -> None:
        """A validation is over."""
        seconds, steps = self.clock.seconds(), self._marks[-1].steps
        if steps:
            self._validation = seconds[VALIDATION] / steps

    @property
    def samples_per_second(self) -> float | None:
        """Over all ranks; None before the first batch."""
        return self._rates and self._rates[0]

    @property
    def data_wait_share(self) -> float | None:
        """Share of the time of training in which this rank waited for its next batch; None before the first."""
        return self._rates and self._rates[1]

    def seconds_left(self, steps: float) -> float | None:
        """Seconds that so many steps will take, at the mean pace so far; None where that is unknown.

        Args:
            steps: Infinite where the run has no end.
        """
        return (
            None if self._step is None or steps == float("inf") else max(0.0, steps) * (self._step + self._validation)
        )

    def describe(self, steps_left: float) -> dict[str, str]:
        """What is shown while a run goes on: rate, share of waiting, time left; what is unknown is left out."""
        shown = {}
        if (rate := self.samples_per_second) is not None:
            shown["samples/s"] = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        if (share := self.data_wait_share) is not None:
            shown["data wait"] = f"{100 * share:.0f} %"
        if (left := self.seconds_left(steps_left)) is not None:
            shown["ETA"] = duration(left)
        return shown


def duration(seconds: float) -> str:
    """``0:01:05``, or ``2 d 3:04:05``."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
