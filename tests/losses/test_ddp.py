"""Under DDP the gradients of encoders and of the loss's own parameters equal those of one process, whatever is missing."""

from __future__ import annotations

import functools
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmrep.encoders.batch_norm import GatheredBatchNorm
from mmrep.losses import ClusterSwapLoss, GRAMLoss, Loss
from mmrep.ops import paths, tiles
from mmrep.ops.gather import sum_over_ranks
from tests.gloo_pool import GlooPool
from tests.golden import cluster_swap as golden
from tests.losses.cases import DIM, LOSSES, NAMES, VIEWS, WITH_VIEWS, clip, confu, pairwise, swap, symile

N, WIDTH = 8, 5
ALSO_WITH_VIEWS = ("clip", "symile-shuffled", "confu", "gram")  # every loss takes views: one line of YAML swaps them
CASES = [
    *((name, VIEWS if name.startswith(WITH_VIEWS) else 1) for name in LOSSES),
    *((name, VIEWS) for name in ALSO_WITH_VIEWS),
    ("bn+clip", 1),
    ("bn+symile-shuffled", 1),
    ("bn+swap-queue", VIEWS),
]
PATTERNS = ("complete", "sample", "batch", "rank", "everywhere")
SIZES = [(4, 4), (5, 3), (7, 1), (8, 0), (3, 2, 3), (0, 8, 0)]


class Objective(nn.Module):
    """Linear encoders and a loss, as DDP wraps them."""

    def __init__(self, loss: Loss, batch_norm: bool = False) -> None:
        super().__init__()
        names = loss.modalities or NAMES
        torch.manual_seed(3)
        self.encoders: nn.ModuleDict = nn.ModuleDict({name: nn.Linear(WIDTH, DIM) for name in names})
        if batch_norm:
            heads = {name: nn.Sequential(GatheredBatchNorm(DIM), nn.Linear(DIM, DIM)) for name in names}
            self.encoders = nn.ModuleDict(
                {name: nn.Sequential(nn.Linear(WIDTH, DIM, bias=False), heads[name]) for name in names}
            )
        self.loss = loss

    def forward(self, inputs: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        rows = {
            name: nn.functional.normalize(
                encoder(inputs[name].flatten(0, 1)).unflatten(0, inputs[name].shape[:2]), dim=2
            )
            for name, encoder in self.encoders.items()
        }
        rows = {name: value if value.shape[1] > 1 else value[:, 0] for name, value in rows.items()}
        result: Tensor = self.loss(rows, {name: present[name] for name in rows}).loss
        return result


def whole_batch(views: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7 + step)
    return {name: torch.randn(N, views, WIDTH, generator=generator) for name in NAMES}


STEPS = {views: [whole_batch(views, step) for step in range(2)] for views in (1, VIEWS)}


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


def gradients(
    name: str, steps: list[dict[str, Tensor]], present: dict[str, Tensor], distributed: bool, way: str = "dense"
) -> dict[str, Tensor]:
    """Gradients and buffers after several calls, and the last loss: queues fill, shifts move on, no later call hangs."""
    with pytest.MonkeyPatch.context() as patch:
        if way != "dense":  # as large batches go, over tiles of two
            patch.setattr(paths, "DENSE_ENTRIES", -1)
            patch.setattr(paths, "CACHE_BYTES", 2**40 if way == "cached" else -1)
            patch.setattr(tiles, "CPU_TILE", 2)
        return _gradients(name, steps, present, distributed)


def _gradients(
    name: str, steps: list[dict[str, Tensor]], present: dict[str, Tensor], distributed: bool
) -> dict[str, Tensor]:
    torch.manual_seed(5)
    objective = Objective(LOSSES[name.removeprefix("bn+")](), batch_norm=name.startswith("bn+"))
    module = DistributedDataParallel(objective, broadcast_buffers=False) if distributed else objective
    for inputs in steps:
        objective.zero_grad()
        loss = module(inputs, present)
        loss.backward()
        objective.loss.before_optimizer_step()  # frozen prototypes lose their gradient on every rank
    found = {key: value.grad for key, value in objective.named_parameters() if value.grad is not None}
    buffers = {f"buffer {key}": value.float() for key, value in objective.named_buffers()}
    return {**found, **buffers, "value": loss.detach()}


@functools.cache
def alone(name: str, views: int, absent: tuple[tuple[str, int], ...]) -> dict[str, Tensor]:
    """What one process computes with the whole batch, where so many rows ``(modality, number)`` are absent."""
    present = {key: torch.ones(N, dtype=torch.bool) for key in NAMES}
    for key, number in absent:
        present[key][number] = False
    return gradients(name, STEPS[views], present, distributed=False)


def split(tensors: dict[str, Tensor], sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [{name: tensor.split(list(sizes))[rank] for name, tensor in tensors.items()} for rank in range(len(sizes))]


@pytest.mark.parametrize(("name", "views"), CASES)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_one_process(
    name: str, views: int, sizes: tuple[int, ...], request: pytest.FixtureRequest
) -> None:
    equal_one_process(name, views, sizes, "dense", request)


@pytest.mark.parametrize("way", ["cached", "tiled"])
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("swap")])
@pytest.mark.parametrize("sizes", [(5, 3), (8, 0), (2, 3, 1, 2)])
def test_so_do_those_of_tiles(name: str, way: str, sizes: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    """One process computes plainly, the ranks by tiles."""
    views = VIEWS if name.startswith(WITH_VIEWS) else 1
    equal_one_process(name, views, sizes, way, request, patterns=("complete", "sample", "rank"))


@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("swap")])
def test_four_ranks_swap_as_one(name: str, request: pytest.FixtureRequest) -> None:
    equal_one_process(name, VIEWS if name.startswith(WITH_VIEWS) else 1, (2, 3, 1, 2), "dense", request)


def equal_one_process(
    name: str,
    views: int,
    sizes: tuple[int, ...],
    way: str,
    request: pytest.FixtureRequest,
    patterns: tuple[str, ...] = PATTERNS,
) -> None:
    """The ranks' gradients, buffers and mean loss are those of the whole batch, whatever is missing."""
    pool: GlooPool = request.getfixturevalue(f"pool{len(sizes)}")
    shares = [split(inputs, sizes) for inputs in STEPS[views]]
    for pattern in patterns:
        present = presence(pattern, sizes)
        absent = tuple((key, int(number)) for key in NAMES for number in (~present[key]).nonzero())
        expected = dict(alone(name, views, absent))
        per_rank = [
            (name, [share[rank] for share in shares], split(present, sizes)[rank], True, way)
            for rank in range(len(sizes))
        ]
        results = pool.run(gradients, per_rank)
        value = torch.stack([result.pop("value") for result in results]).mean()
        assert float(value) == pytest.approx(float(expected.pop("value")), rel=1e-5, abs=1e-6)
        for result, (key, tensor) in itertools.product(results, expected.items()):
            error = float((result[key] - tensor).norm() / tensor.norm().clamp(min=1e-3))
            assert error < 1e-5, f"{pattern}: {key} is off by {error:.1e}"


def test_the_check_can_fail() -> None:
    """Local negatives only, the usual mistake, differ by far more than the tolerance."""
    inputs, present = whole_batch(1, 0), presence("complete", (4, 4))
    expected = gradients("clip", [inputs], present, distributed=False)["encoders.a.weight"]
    halves = [
        gradients("clip", [i], p, False) for i, p in zip(split(inputs, (4, 4)), split(present, (4, 4)), strict=True)
    ]
    local = torch.stack([half["encoders.a.weight"] for half in halves]).mean(0)
    assert float((local - expected).norm() / expected.norm()) > 1e-2


def fails_everywhere(rank: int) -> str:
    """A NaN on one rank only."""
    rows = {name: torch.ones(3, DIM) for name in NAMES}
    if rank == 1:
        rows["c"][2, 1] = torch.nan
    messages = []
    for make in (clip, symile, swap, partial(pairwise, positives="aligned"), GRAMLoss, confu):
        try:
            make()(rows)
        except Exception as error:
            messages.append(str(error))
    return "\n".join(messages)


def test_nan_on_one_rank_ends_every_rank(pool2: GlooPool) -> None:
    """If only the rank that has it stopped, the others would wait in the next collective."""
    for message in pool2.run(fails_everywhere, [(0,), (1,)]):
        lines = message.splitlines()
        assert len(lines) == 6 and all("NaN or infinity: 'c' in 1 samples" in line for line in lines)


def golden_gradients(rank: int, rows: Tensor, distributed: bool) -> dict[str, Tensor]:
    """G8: three crops through a linear encoder that is the identity, float64."""
    loss = ClusterSwapLoss(modalities=["image"], embed_dim=golden.D, num_prototypes=golden.K, teacher_views=2).double()
    encoder = nn.Linear(golden.D, golden.D, bias=False).double()
    with torch.no_grad():
        loss.bank.shared_0.copy_(golden.prototypes())
        encoder.weight.copy_(torch.eye(golden.D))
    both = nn.ModuleDict({"encoder": encoder, "loss": loss})
    value = loss({"image": encoder(rows)}).loss
    value.backward()
    found = {name: parameter.grad for name, parameter in both.named_parameters() if parameter.grad is not None}
    if distributed:
        found = {name: sum_over_ranks(gradient) / 2 for name, gradient in found.items()}
    return {**found, "value": value.detach()}


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3)])
def test_g8_on_two_ranks_is_one_process_to_1e_12(pool2: GlooPool, sizes: tuple[int, int]) -> None:
    rows = torch.stack([golden.features(view) for view in range(3)], dim=1)
    expected = golden_gradients(0, rows, False)
    assert float(expected["value"]) == pytest.approx(golden.G8_THREE_CROPS, abs=1e-12)
    results = pool2.run(golden_gradients, [(r, part, True) for r, part in enumerate(rows.split(list(sizes)))])
    mean = torch.stack([result.pop("value") for result in results]).mean()
    assert float(mean) == pytest.approx(golden.G8_THREE_CROPS, abs=1e-12)
    for result, (name, gradient) in itertools.product(results, expected.items()):
        if name != "value":
            assert torch.allclose(result[name], gradient, rtol=0, atol=1e-12), name
