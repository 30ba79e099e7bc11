"""`ClockProfiler`: Lightning's own marks of what it does, told to a `StepClock`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pytorch_lightning.profilers import Profiler

from mmrep.ops.step_clock import CHECKPOINT, DATA, LOSS_BACKWARD, OPTIMISER, REST, StepClock

ACTIONS = {
    "train_dataloader_next": DATA,
    "batch_to_device": DATA,
    "optimizer_step": OPTIMISER,
    "training_step": REST,
    "backward": LOSS_BACKWARD,
    "save_checkpoint": CHECKPOINT,
}
"""Last word of an action of Lightning -> part of the step. An optimiser step calls the training step and the backward pass,
which take their time out of it; what is left is the step itself, clipping and zeroing."""
EPOCH = "run_training_epoch"
MARKED = {*ACTIONS, EPOCH}


class ClockProfiler(Profiler):
    """Passes everything on to another profiler, and has its attributes.

    Args:
        clock: What is told.
        inner: The trainer's profiler.
    """

    def __init__(self, clock: StepClock, inner: Profiler) -> None:
        self.clock, self.inner = clock, inner  # and none of a profiler's own attributes: they are the other's

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # of an object that is only being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __del__(self) -> None:
        """A profiler's own ends what it has begun; the other goes on."""

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        self._enter(action_name)

    def stop(self, action_name: str) -> None:
        self._leave(action_name)
        self.inner.stop(action_name)

    def profile(self, action_name: str) -> Any:
        """The other's own, which may do more than to start and to stop."""
        theirs: AbstractContextManager[Any] = self.inner.profile(action_name)
        return self._marked(action_name, theirs) if _last_word(action_name) in MARKED else theirs

    @contextmanager
    def _marked(self, action_name: str, theirs: AbstractContextManager[Any]) -> Iterator[Any]:
        with theirs as given:
            self._enter(action_name)
            try:
                yield given
            finally:
                self._leave(action_name)

    def _enter(self, action_name: str) -> None:
        part = ACTIONS.get(_last_word(action_name))
        if part is not None:
            self.clock.enter(part)
        elif action_name == EPOCH:  # what it begins with is the start of the loader's processes
            self.clock.switch(DATA)

    def _leave(self, action_name: str) -> None:
        if _last_word(action_name) in ACTIONS:
            self.clock.leave()

    def summary(self) -> str:
        return self.inner.summary()

    def describe(self) -> None:
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        self.inner.teardown(stage)


def _last_word(action_name: str) -> str:
    return action_name.rpartition(".")[2]
