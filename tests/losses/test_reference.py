"""Every loss equals its literal formula, on every path of its kernels, whatever is missing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mmrep.losses import (
    ClusterSwapLoss,
    ConFuLoss,
    GRAMLoss,
    Loss,
    ModalityPairwiseLoss,
    PairwiseCLIPLoss,
    SymileLoss,
    TriangleLoss,
    geometric,
    reference,
)
from mmrep.losses.confu import _fused
from mmrep.ops import paths, row_cross_entropy, tiles
from tests.losses.cases import NAMES, random_presence, unit_rows

N, DIM, VIEWS = 11, 6, 2
Found = tuple[Loss, Callable[[dict[str, Tensor]], Tensor]]


def clip(dtype: torch.dtype, scale: float) -> Found:
    loss = PairwiseCLIPLoss(init_temperature=1 / scale).to(dtype)
    return loss, lambda rows: reference.pairwise_clip(rows, loss.scale)


def clip_weights(dtype: torch.dtype, scale: float) -> Found:
    weights = {("a", "b"): 2.0, ("c", "b"): 0.5}
    loss = PairwiseCLIPLoss(pairs={"a-b": 2.0, "c-b": 0.5}, init_temperature=1 / scale).to(dtype)
    return loss, lambda rows: reference.pairwise_clip(rows, loss.scale, weights)


def siglip(dtype: torch.dtype, scale: float) -> Found:
    loss = PairwiseCLIPLoss(form="sigmoid", init_temperature=1 / scale).to(dtype)

    def expected(rows: dict[str, Tensor]) -> Tensor:
        pairs = itertools.combinations(rows, 2)
        return torch.stack([reference.sigmoid(rows[a], rows[b], loss.scale, loss.logit_bias) for a, b in pairs]).mean()

    return loss, expected


def symile_all(dtype: torch.dtype, scale: float) -> Found:
    loss = SymileLoss(negatives="all", init_logit_scale=math.log(scale)).to(dtype)
    return loss, lambda rows: reference.symile_all(rows, loss.scale)


def symile_shuffled(dtype: torch.dtype, scale: float) -> Found:
    loss = SymileLoss(init_logit_scale=math.log(scale)).to(dtype)

    def expected(rows: dict[str, Tensor]) -> Tensor:
        shifts = loss.eval()._shifts(rows, len(rows["a"]), torch.device("cpu"))
        return reference.symile_shuffled(rows, loss.scale, shifts)

    return loss.eval(), expected


def gram(dtype: torch.dtype, scale: float) -> Found:
    loss = GRAMLoss(init_temperature=1 / scale).to(dtype)
    size = lambda tuples: reference.volume(tuples, 1e-6)  # noqa: E731  # a name for one argument below
    return loss, lambda rows: reference.geometric(rows, loss.scale, size, 0.1)


def triangle(dtype: torch.dtype, scale: float) -> Found:
    loss = TriangleLoss(init_temperature=1 / scale).to(dtype)
    return loss, lambda rows: reference.geometric(rows, loss.scale, reference.twice_squared_area, 0.1)


def confu(dtype: torch.dtype, scale: float) -> Found:
    loss = ConFuLoss(modalities=NAMES, embed_dim=DIM, init_temperature=1 / scale, fusion_width=9).to(dtype)

    def expected(rows: dict[str, Tensor]) -> Tensor:
        everything, _ = loss.prepare(rows, None)
        return reference.confu(rows, loss.scale, {name: everything[_fused(name)] for name in rows}, 0.5)

    return loss, expected


def swap(dtype: torch.dtype, scale: float) -> Found:
    loss = ClusterSwapLoss(modalities=NAMES, embed_dim=DIM, num_prototypes=7, temperature=1 / scale).to(dtype)
    weights = [[float(a != b) for b in NAMES] for a in NAMES]
    options = {"temperature": 1 / scale, "epsilon": 0.05, "iterations": 3}
    return loss, lambda rows: reference.cluster_swap(list(rows.values()), loss.bank.shared_0, weights, **options)


def pairwise(positives: str, exclude: bool = False) -> Callable[[torch.dtype, float], Found]:
    def make(dtype: torch.dtype, scale: float) -> Found:
        loss = ModalityPairwiseLoss(
            positives=positives, exclude_aligned=exclude, init_temperature=1 / scale, learn_temperature=True
        ).to(dtype)
        return loss, lambda rows: reference.modality_pairwise(rows, loss.scale, positives, exclude)

    return make


CASES: dict[str, Callable[[torch.dtype, float], Found]] = {
    "clip": clip,
    "clip-weights": clip_weights,
    "siglip": siglip,
    "symile-all": symile_all,
    "symile-shuffled": symile_shuffled,
    "gram": gram,
    "triangle": triangle,
    "confu": confu,
    "swap": swap,
    "pairwise-aligned": pairwise("aligned"),
    "pairwise-other": pairwise("other_view"),
    "pairwise-all": pairwise("all"),
    "pairwise-legacy": pairwise("other_view", exclude=True),
}
WAYS = {"as chosen": (2**16, 2**28), "cached": (-1, 2**40), "tiled": (-1, -1)}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every kernel goes one way, over tiles of four."""
    dense, cache = WAYS[request.param]
    monkeypatch.setattr(paths, "DENSE_ENTRIES", dense)
    monkeypatch.setattr(paths, "CACHE_BYTES", cache)
    monkeypatch.setattr(tiles, "CPU_TILE", 4)
    monkeypatch.setattr(geometric, "STRIP", 4)
    monkeypatch.setattr(row_cross_entropy, "CPU_STRIP", 4)
    monkeypatch.setattr(row_cross_entropy, "LEAST_HEIGHT", 4)
    return request.param


def compare(name: str, dtype: torch.dtype, scale: float, tolerance: float) -> None:
    """Loss and gradients, complete, and with samples that lack a modality: the formula then sees the others only."""
    for missing in (False, True):
        rows = unit_rows(NAMES, N, DIM)
        if name.startswith("pairwise"):
            rows = {
                key: torch.stack([r, *unit_rows([key], N, DIM, 1 + v).values()], 1)
                for v, (key, r) in enumerate(rows.items())
            }
        rows = {key: r.to(dtype).requires_grad_() for key, r in rows.items()}
        present = {key: torch.ones(N, dtype=torch.bool) for key in NAMES}
        if missing:  # one sample lacks everything: no term of any loss has it
            present = {key: torch.arange(N) != 4 for key in NAMES}
        loss, literal = CASES[name](dtype, scale)
        found = loss(rows, present).loss
        wanted = literal({key: r[present[key]] for key, r in rows.items()})
        assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=tolerance, abs=tolerance)
        parameters = [p for p in loss.parameters() if p.requires_grad]
        inputs = [*rows.values(), *parameters]
        ours = torch.autograd.grad(found, inputs, allow_unused=True, materialize_grads=True)
        theirs = torch.autograd.grad(wanted, inputs, allow_unused=True, materialize_grads=True)
        for mine, right in zip(ours, theirs, strict=True):
            assert float((mine - right).norm()) <= 10 * tolerance * max(1.0, float(right.norm()))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula_in_float64(name: str, way: str) -> None:
    compare(name, torch.float64, 14.3, 1e-12)


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("gram", "triangle", "swap")])
def test_equals_the_formula_in_fp32(name: str, scale: float, way: str) -> None:
    compare(name, torch.float32, scale, 5e-6)


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_symile_of_any_number_of_modalities_with_missing_ones(m: int, way: str) -> None:
    """The split into two groups of products is another for each M."""
    names = [f"m{number}" for number in range(m)]
    rows = {key: r.requires_grad_() for key, r in unit_rows(names, 5, 4).items()}
    present = random_presence(names, 5, share=0.9)
    whole = torch.stack(list(present.values())).all(dim=0)
    assert whole.sum() >= 2
    loss = SymileLoss(negatives="all", init_logit_scale=1.5).double()
    found = loss(rows, present).loss
    wanted = reference.symile_all({key: r[whole] for key, r in rows.items()}, loss.scale)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    inputs = [*rows.values(), loss.logit_scale]
    for mine, right in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert torch.allclose(mine, right, rtol=0, atol=1e-12)
