"""One cell: train with an objective on samples that lack modalities, test on complete ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare.cache import Split, load_split
from benchmarks.compare.encoders import make_encoders
from benchmarks.compare.missing import presence
from benchmarks.compare.settings import BY_NAME, JOINT, MODALITIES, SINGLE, Cell, Objective, Settings
from mmrep.batch import Input
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.retrieval import Direction, Scorer, retrieve
from mmrep.losses import Loss, TriangleLoss
from mmrep.model import MultimodalModel
from mmrep.modules.optim import make_optimizer, warmup_cosine

TEST_SPLIT = "test_both"


class Cosine:
    """Ranks by inner products: the rule for one given modality where an objective has none (TRIANGLE)."""

    def score(self, *, target: str, candidates: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The sum of the inner products ``[Q, C]``."""
        return torch.stack([rows @ candidates.T for rows in given.values()]).sum(dim=0)


def run_cell(cell: Cell, settings: Settings, data: Path, cache: Path) -> dict[str, Any]:
    """Train and test once.

    Args:
        cell: Which.
        settings: The budget.
        data: Folder of the tasks' shards.
        cache: Of prepared splits.

    Returns:
        The row of the result, without its digest.
    """
    start = time.monotonic()
    training = load_split(data / cell.task, "train", settings, cache, train=True)
    testing = load_split(data / cell.task, TEST_SPLIT, settings, cache, train=False)
    model = train(cell, settings, training)
    figures = test(model, cell.task, testing)
    return {
        "objective": cell.objective,
        "task": cell.task,
        "missing": cell.missing,
        "seed": cell.seed,
        "recall@1": sum(found["recall@1"] for found in figures.values()) / len(figures),
        "chance": sum(found["chance_recall@1"] for found in figures.values()) / len(figures),
        "directions": {name: {"recall@1": f["recall@1"], "mrr": f["mrr"]} for name, f in figures.items()},
        "seconds": round(time.monotonic() - start, 1),
    }


def train(cell: Cell, settings: Settings, data: Split) -> MultimodalModel:
    """A trained model: AdamW, warm-up and cosine, a fixed number of epochs; nothing is chosen by looking at held-out data."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    objective, generator = BY_NAME[cell.objective], np.random.default_rng(cell.seed)
    model = MultimodalModel(make_encoders(settings), objective.make(cell.task, settings.embed_dim)).train()
    loss: Loss = model.loss
    optimizer = make_optimizer("adamw", model, loss.not_decayed(), lr=settings.lr, weight_decay=settings.weight_decay)
    for group in optimizer.param_groups:
        group["fused"] = True  # one pass over the weights and not ten: a tenth of the time of a step
    steps = -(-len(data) // settings.batch_size)
    rate = warmup_cosine(settings.warmup_steps, settings.epochs[cell.task] * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    present = presence(cell.seed, data.keys, MODALITIES, cell.missing)
    for epoch in range(settings.epochs[cell.task]):
        for numbers in np.array_split(generator.permutation(len(data)), steps):
            there = {name: mask[numbers] for name, mask in present.items()}
            rows = model(inputs(data, objective, epoch, numbers, there))
            optimizer.zero_grad()
            loss(rows, there).loss.backward()
            loss.before_optimizer_step()
            optimizer.step()
            schedule.step()
    return model.eval()


def inputs(
    data: Split, objective: Objective, epoch: int, numbers: np.ndarray, present: Mapping[str, Tensor]
) -> dict[str, Input]:
    """A batch ``{modality: [B, ...]}``, or a list of one tensor ``[B, V, ...]`` of views; zeros where absent."""
    found: dict[str, Input] = {}
    for name in MODALITIES:
        draws = [data.rows(name, epoch * objective.views + view, numbers) for view in range(objective.views)]
        for rows in draws:
            rows[~present[name]] = 0
        found[name] = draws[0] if objective.views == 1 else [torch.stack(draws, dim=1)]
    return found


@torch.inference_mode()
def test(model: MultimodalModel, task: str, data: Split) -> dict[str, dict[str, Any]]:
    """Direction -> figures of retrieval on complete samples, by the objective's own score."""
    numbers = np.arange(len(data))
    rows = model({name: data.rows(name, 0, numbers) for name in MODALITIES})
    everyone = torch.ones(len(data), dtype=torch.bool)
    embeddings = Embeddings(rows, dict.fromkeys(MODALITIES, everyone), data.labels, data.keys)
    names = (JOINT,) if task == "joint" else SINGLE
    loss: Loss = model.loss
    scorer: Scorer = Cosine() if isinstance(loss, TriangleLoss) and task == "plain" else loss
    return retrieve(embeddings, scorer, [Direction.parse(name, MODALITIES) for name in names])
