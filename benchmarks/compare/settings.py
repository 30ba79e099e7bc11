"""What is compared: the objectives, the tasks, the budget that all of them get, and the cells of the table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mmrep.losses import (
    ClusterSwapLoss,
    ConFuLoss,
    GRAMLoss,
    Loss,
    ModalityPairwiseLoss,
    PairwiseCLIPLoss,
    SymileLoss,
    TriangleLoss,
)
from mmrep.stable_hash import stable_hash

MODALITIES = ("image", "text", "audio")
TASKS = ("joint", "plain")
MISSING = (0.0, 0.3, 0.5)
SEEDS = (0, 1, 2)
JOINT = "audio+text->image"
SINGLE = tuple(f"{a}->{b}" for a in sorted(MODALITIES) for b in sorted(MODALITIES) if a != b)


@dataclass(frozen=True)
class Objective:
    """One line of the table.

    Attributes:
        name: What it is called there.
        loss: Its class.
        options: Of the class, beside the modalities.
        on_task: Further options on one of the tasks.
        views: Draws of each sample in a step.
        needs_width: Whether the class takes ``embed_dim``.
    """

    name: str
    loss: type[Loss]
    options: Mapping[str, Any] = field(default_factory=dict)
    on_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    views: int = 1
    needs_width: bool = False

    def options_on(self, task: str) -> dict[str, Any]:
        """All options on a task."""
        return {**self.options, **self.on_task.get(task, {})}

    def make(self, task: str, embed_dim: int) -> Loss:
        """The loss."""
        width = {"embed_dim": embed_dim} if self.needs_width else {}
        return self.loss(modalities=list(MODALITIES), **width, **self.options_on(task))


OBJECTIVES = (
    Objective("pairwise CLIP", PairwiseCLIPLoss),
    Objective("SigLIP", PairwiseCLIPLoss, {"form": "sigmoid"}),
    # The product alone need not align two modalities: where one is to find one other, a pairwise term is added.
    Objective("Symile", SymileLoss, {"negatives": "shuffled"}, {"plain": {"pairwise_weight": 4.0}}, needs_width=True),
    Objective("modality-pairwise", ModalityPairwiseLoss, {"exclude_aligned": True}, views=2),
    Objective(
        "cross-modal SwAV",
        ClusterSwapLoss,
        {"num_prototypes": 128, "epsilon": 0.02, "freeze_steps": 20},
        needs_width=True,
    ),
    Objective("GRAM", GRAMLoss),
    Objective("TRIANGLE", TriangleLoss),
    Objective("ConFu", ConFuLoss, needs_width=True),
)
BY_NAME = {objective.name: objective for objective in OBJECTIVES}


@dataclass(frozen=True)
class Settings:
    """The encoders, the data and the budget: one for all objectives.

    Attributes:
        image_size, image_width: Of `ConvImageEncoder`.
        text_width, text_buckets, text_length, text_drop: Of `NgramTextEncoder`.
        seconds, audio_width: Of `MelAudioEncoder`.
        embed_dim: Width of the embedding space.
        batch_norm: Of all encoders' heads.
        draws: Task -> how often each training sample is drawn, augmented; epochs take the draws in turn.
        epochs: Task -> passes over the training split.
        batch_size: Samples of a step.
        lr, weight_decay, warmup_steps: Of AdamW with warm-up and cosine.
        limit: Task -> at most so many training samples; 0 for all.
    """

    image_size: int = 24
    image_width: int = 16
    text_width: int = 128
    text_buckets: int = 4096
    text_length: int = 96
    text_drop: float = 0.1
    seconds: float = 1.25
    audio_width: int = 64
    embed_dim: int = 128
    batch_norm: bool = True
    draws: Mapping[str, int] = field(default_factory=lambda: {"joint": 2, "plain": 4})
    epochs: Mapping[str, int] = field(default_factory=lambda: {"joint": 8, "plain": 20})
    batch_size: int = 128
    lr: float = 4e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    limit: Mapping[str, int] = field(default_factory=lambda: {"joint": 0, "plain": 0})


@dataclass(frozen=True)
class Cell:
    """One training: an objective on a task, a share of missing modalities, a seed."""

    objective: str
    task: str
    missing: float
    seed: int


def digest(cell: Cell, settings: Settings, fingerprint: str) -> str:
    """What the figures of a cell depend on, but for the code: a row with another digest is measured anew.

    Args:
        cell: Which.
        settings: The budget.
        fingerprint: Of the data.
    """
    objective, shared = BY_NAME[cell.objective], asdict(settings)
    for per_task in ("draws", "epochs", "limit"):
        shared[per_task] = shared[per_task][cell.task]
    own = {"loss": objective.loss.__name__, "options": objective.options_on(cell.task), "views": objective.views}
    return f"{stable_hash(json.dumps([asdict(cell), own, shared, fingerprint], sort_keys=True)):016x}"


def cells(
    objectives: Iterable[str] = tuple(BY_NAME),
    tasks: Iterable[str] = TASKS,
    missing: Iterable[float] = MISSING,
    seeds: Iterable[int] = SEEDS,
) -> list[Cell]:
    """The cells that are asked for, those that tell most first: complete data, one seed; then seeds, then what is missing."""
    shares, numbers = sorted(missing), list(seeds)
    order = itertools.product(shares, numbers, tasks, objectives)
    return [Cell(objective, task, share, seed) for share, seed, task, objective in order]
