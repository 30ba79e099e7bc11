"""`ClockProfiler`: Lightning's own marks of what it does, told to a `StepClock`."""

from __future__ import annotations

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


class ClockProfiler(Profiler):
    """Passes every action on to another profiler.

    Args:
        clock: What is told.
        inner: The trainer's profiler.
    """

    def __init__(self, clock: StepClock, inner: Profiler) -> None:
        super().__init__()
        self.clock, self.inner = clock, inner

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        part = ACTIONS.get(action_name.rpartition(".")[2])
        if part is not None:
            self.clock.enter(part)
        elif action_name == EPOCH:  # what it begins with is the start of the loader's processes
            self.clock.switch(DATA)

    def stop(self, action_name: str) -> None:
        if action_name.rpartition(".")[2] in ACTIONS:
            self.clock.leave()
        self.inner.stop(action_name)

    def summary(self) -> str:
        return self.inner.summary()

    def describe(self) -> None:
        self.inner.describe()

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        inner: Any = getattr(self, "inner", None)
        if inner is not None:
            inner.teardown(stage)
