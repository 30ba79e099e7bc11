"""`StepClock`: where the time of a training step goes.

At every moment one part of the step runs: the innermost of those that were entered. The clock notes the moments at which
that changes, and nothing else; the parts' times add up to the whole. On a GPU a moment is an event in the queue of its work,
so that nothing waits for it: what a part gets is the time until the GPU has done all that was queued before the next part.

Parts are marked where they are, `with timed(COMMUNICATION):`, which does nothing while no clock runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

DATA, COMMUNICATION, OPTIMISER = "data", "communication", "optimiser"
ENCODERS_FORWARD, ENCODERS_BACKWARD = "encoders forward", "encoders backward"
LOSS_FORWARD, LOSS_BACKWARD = "loss forward", "loss backward"
VALIDATION, CHECKPOINT, REST = "validation", "checkpoint", "rest"
PARTS = (
    *(DATA, ENCODERS_FORWARD, ENCODERS_BACKWARD, LOSS_FORWARD, LOSS_BACKWARD, COMMUNICATION, OPTIMISER),
    *(VALIDATION, CHECKPOINT, REST),
)
"""All parts, in the order in which they are shown."""
WHOLE = (VALIDATION, CHECKPOINT)
"""Parts to which all belongs that happens inside, but for a checkpoint inside a validation."""


class Stamps(Protocol):
    """What tells a clock the time."""

    def now(self) -> Any:
        """A moment."""

    def seconds(self, start: Any, end: Any) -> float | None:
        """Seconds from one moment to another; None while they are not known yet. ``start`` is not asked about again."""

    def wait(self) -> None:
        """Wait until all moments so far are known."""


class HostStamps:
    """Moments of the process itself."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        pass


class CudaStamps:
    """Moments in the current stream of a GPU; an event is used again once it is known."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        if not end.query():
            return None
        milliseconds: float = start.elapsed_time(end)
        self._free.append(start)
        return milliseconds / 1000

    def wait(self) -> None:
        torch.cuda.synchronize()


class StepClock:
    """Adds up the time of each part.

    Args:
        stamps: What tells the time; by default the process's own clock.

    Example:
        >>> clock = StepClock()
        >>> clock.enter(DATA)
        >>> clock.leave()
        >>> set(clock.seconds()) == set(PARTS)
        True
    """

    def __init__(self, stamps: Stamps | None = None) -> None:
        self._stamps: Stamps = stamps or HostStamps()
        self._stack = [REST]
        self._spans: deque[tuple[str, Any, Any]] = deque()
        self.reset()

    def reset(self) -> None:
        """Forget all times; what is entered stays entered."""
        self._spans.clear()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = self._stamps.now()

    def enter(self, part: str) -> None:
        """From now on ``part`` runs. Inside a validation or a checkpoint everything belongs to it: see `WHOLE`."""
        running = self._stack[-1]
        self._change([*self._stack, running if running in WHOLE and part != CHECKPOINT else part])

    def leave(self) -> None:
        """The part that was entered last is over; what was entered before it goes on."""
        self._change(self._stack[:-1])

    def switch(self, part: str) -> None:
        """From now on ``part`` runs in place of what was entered last."""
        if self._stack[-1] not in WHOLE:
            self._change([*self._stack[:-1], part])

    def _change(self, stack: list[str]) -> None:
        if stack[-1] != self._stack[-1]:
            now = self._stamps.now()
            self._spans.append((self._stack[-1], self._last, now))
            self._last = now
        self._stack = stack

    def seconds(self, *, wait: bool = False) -> dict[str, float]:
        """Seconds of every part so far.

        Args:
            wait: For all of them; otherwise those that a GPU has not reached are left for later.
        """
        part = self._stack[-1]
        now = self._stamps.now()
        self._spans.append((part, self._last, now))
        self._last = now
        if wait:
            self._stamps.wait()
        while self._spans:
            name, start, end = self._spans[0]
            passed = self._stamps.seconds(start, end)
            if passed is None:
                break
            self._seconds[name] += passed
            self._spans.popleft()
        return dict(self._seconds)


_running: StepClock | None = None


@contextmanager
def running(clock: StepClock) -> Iterator[StepClock]:
    """Let a clock run: `timed` marks its times. One at a time, in one process."""
    global _running
    before, _running = _running, clock
    try:
        yield clock
    finally:
        _running = before


@contextmanager
def timed(name: str) -> Iterator[None]:
    """What happens inside belongs to this part of the step; also a decorator of functions."""
    clock = _running
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()


def mark_backward(rows: dict[str, Tensor], *, several_ranks: bool) -> None:
    """Tell the running clock when the gradients of ``rows`` are there: the loss's backward is over, the encoders' begins.

    Args:
        rows: What the encoders gave to the loss.
        several_ranks: Whether the backward pass ends with waiting for the sums of gradients over the ranks: what it takes
            once all gradients are computed is communication.
    """
    clock = _running
    if clock is None:
        return
    begun = False

    def arrived(_: Tensor) -> None:
        nonlocal begun
        if begun:
            return
        begun = True
        clock.switch(ENCODERS_BACKWARD)
        if several_ranks:  # what is asked for first runs first: before DDP's own waiting
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: clock.switch(COMMUNICATION))

    for tensor in rows.values():
        if tensor.requires_grad:
            tensor.register_hook(arrived)
