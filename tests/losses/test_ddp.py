"""Under DDP the gradients of encoders and of the loss's own parameters equal those of one process, whatever is missing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmrep.encoders.batch_norm import GatheredBatchNorm
from mmrep.losses import Loss, PairwiseCLIPLoss, SymileLoss
from tests.gloo_pool import GlooPool

NAMES = ("a", "b", "c")
N, WIDTH, DIM = 8, 5, 6
LOSSES: dict[str, Any] = {
    "clip": lambda: PairwiseCLIPLoss(),
    "clip-sum": lambda: PairwiseCLIPLoss(reduction="sum"),
    "symile-shuffled": lambda: SymileLoss(negatives="shuffled"),
    "symile-all": lambda: SymileLoss(negatives="all"),
}
PATTERNS = ("complete", "sample", "batch", "rank", "everywhere")


class Objective(nn.Module):
    """Linear encoders and a loss, as DDP wraps them."""

    def __init__(self, loss: Loss, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoders: nn.ModuleDict = nn.ModuleDict({name: nn.Linear(WIDTH, DIM) for name in NAMES})
        if batch_norm:
            heads = {name: nn.Sequential(GatheredBatchNorm(DIM), nn.Linear(DIM, DIM)) for name in NAMES}
            self.encoders = nn.ModuleDict(
                {name: nn.Sequential(nn.Linear(WIDTH, DIM, bias=False), heads[name]) for name in NAMES}
            )
        self.loss = loss

    def forward(self, inputs: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        rows = {name: nn.functional.normalize(self.encoders[name](value), dim=1) for name, value in inputs.items()}
        result: Tensor = self.loss(rows, present).loss
        return result


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(N, WIDTH, generator=generator) for name in NAMES}


def presence(pattern: str, sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Which rows of the whole batch are there, for ranks of the given sizes."""
    present = {name: torch.ones(N, dtype=torch.bool) for name in NAMES}
    if pattern == "sample":
        present["b"][2] = present["a"][5] = False
    elif pattern == "batch":  # one modality is in one sample only
        present["c"][1:] = False
    elif pattern == "rank":  # the last rank that has rows lacks a modality altogether
        present["b"][N - max(1, [size for size in sizes if size][-1]) :] = False
    elif pattern == "everywhere":
        present["a"][:] = False
    return present


def gradients(name: str, inputs: dict[str, Tensor], present: dict[str, Tensor], distributed: bool) -> dict[str, Tensor]:
    """Gradients after two steps' worth of calls, and the loss; the second call must not hang either."""
    objective = Objective(LOSSES[name.removeprefix("bn+")](), batch_norm=name.startswith("bn+"))
    module = DistributedDataParallel(objective) if distributed else objective
    for _ in range(2):
        objective.zero_grad()
        loss = module(inputs, present)
        loss.backward()
    found = {key: value.grad for key, value in objective.named_parameters() if value.grad is not None}
    return {**found, "value": loss.detach()}


def split(tensors: dict[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [{name: tensor.split(list(sizes))[rank] for name, tensor in tensors.items()} for rank in range(len(sizes))]


@pytest.mark.parametrize("name", [*LOSSES, "bn+clip", "bn+symile-shuffled"])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (7, 1), (8, 0), (3, 2, 3), (0, 8, 0)])
def test_gradients_equal_one_process(name: str, sizes: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    pool: GlooPool = request.getfixturevalue(f"pool{len(sizes)}")
    for pattern in PATTERNS:
        inputs, present = whole_batch(), presence(pattern, sizes)
        expected = gradients(name, inputs, present, distributed=False)
        per_rank = [(name, i, p, True) for i, p in zip(split(inputs, sizes), split(present, sizes), strict=True)]
        results = pool.run(gradients, per_rank)
        value = torch.stack([result.pop("value") for result in results]).mean()
        assert float(value) == pytest.approx(float(expected["value"]), rel=1e-5, abs=1e-6)
        for result, (key, gradient) in itertools.product(results, expected.items()):
            if key != "value":
                error = float((result[key] - gradient).norm() / gradient.norm().clamp(min=1e-3))
                assert error < 1e-5, f"{pattern}: {key} is off by {error:.1e}"


def test_the_check_can_fail() -> None:
    """Local negatives only, the usual mistake, differ by far more than the tolerance."""
    inputs, present = whole_batch(), presence("complete", (4, 4))
    expected = gradients("clip", inputs, present, distributed=False)["encoders.a.weight"]
    halves = [
        gradients("clip", i, p, False) for i, p in zip(split(inputs, (4, 4)), split(present, (4, 4)), strict=True)
    ]
    local = torch.stack([half["encoders.a.weight"] for half in halves]).mean(0)
    assert float((local - expected).norm() / expected.norm()) > 1e-2
