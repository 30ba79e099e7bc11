"""Sinkhorn-Knopp: against the usual form, over uneven ranks, where the usual form breaks, and at the border of two ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.traffic import Traffic
from mmrep.ops import sinkhorn as module
from mmrep.ops.gather import gather_stacked
from mmrep.ops.sinkhorn import SAFE_RANGE, sinkhorn
from tests.gloo_pool import GlooPool


def linear(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """As published: rows and columns rescaled in turn, with all its factors."""
    q = torch.exp(scores / epsilon).T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / k
        q = q / q.sum(dim=0, keepdim=True) / b
    return (q * b).T


def scores_of(n: int, k: int = 5, seed: int = 0) -> Tensor:
    return 2 * torch.rand(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def codes_of(scores: Tensor, **options: float | int) -> Tensor:
    settings = {"epsilon": 0.05, "iterations": 3, **options}
    valid = torch.ones(1, len(scores), dtype=torch.bool)
    return sinkhorn(scores[None], valid, epsilon=settings["epsilon"], iterations=int(settings["iterations"]))[0]


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_the_linear_form(iterations: int) -> None:
    scores = scores_of(11)
    assert torch.allclose(codes_of(scores, iterations=iterations), linear(scores, 0.05, iterations), rtol=0, atol=1e-13)


def test_rows_sum_to_one_and_prototypes_share_alike_in_the_end() -> None:
    codes = codes_of(scores_of(30), iterations=300)
    assert torch.allclose(codes.sum(dim=1), torch.ones(30, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(codes.sum(dim=0), torch.full((5,), 6.0, dtype=torch.float64), atol=1e-3)


def test_a_tiny_epsilon_breaks_the_linear_form_only() -> None:
    scores = scores_of(16).float()
    assert not bool(linear(scores, 0.005, 3).isfinite().all())
    exact = codes_of(scores.double(), epsilon=0.005)
    for half in (torch.float32, torch.bfloat16, torch.float16):
        rounded = scores.to(half)
        found = codes_of(rounded, epsilon=0.005)
        assert found.dtype == torch.float32 and bool(found.isfinite().all())
        assert torch.allclose(found.double(), codes_of(rounded.double(), epsilon=0.005), atol=1e-4)
    assert torch.allclose(codes_of(scores, epsilon=0.005).double(), exact, atol=1e-4)


@pytest.mark.parametrize("width", [SAFE_RANGE - 0.01, SAFE_RANGE + 0.01])
@pytest.mark.parametrize("offset", [0.0, -300.0, 300.0])
def test_at_the_border_both_ways_equal_float64(width: float, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits at the ends of the range only: what scaling vectors can bear least, wherever the range lies."""
    logits = torch.where(torch.rand(400, 300) < 0.5, 0.0, width)
    logits[0], logits[:, 0] = 0.0, 0.0
    logits[1], logits[:, 1] = width, width
    scores = ((logits + offset) * 0.05)[None]
    valid, taken = torch.ones(1, 400, dtype=torch.bool), []
    for name in ("_Exponentials", "_Logarithms"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, f=function: taken.append(name) or f(*a))
    found = sinkhorn(scores, valid, epsilon=0.05, iterations=3)
    assert taken == ["_Exponentials" if width < SAFE_RANGE else "_Logarithms"]
    monkeypatch.setattr(module, "SAFE_RANGE", 0.0)
    assert torch.allclose(found.double(), sinkhorn(scores.double(), valid, epsilon=0.05, iterations=3), atol=1e-4)
    assert bool(found.isfinite().all()) and torch.allclose(found.sum(dim=2), torch.ones(1, 400), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.floats(0.01, 1.0), st.integers(1, 4), st.integers(0, 999))
def test_both_ways_agree(n: int, k: int, epsilon: float, iterations: int, seed: int) -> None:
    scores, valid = scores_of(n, k, seed)[None], torch.rand(1, n) < 0.8
    found = []  # in blocks of one row or two
    for safe_range in (0.0, torch.inf):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "SAFE_RANGE", safe_range)
            patch.setattr(module, "CPU_BLOCK", 2 * k)
            found.append(sinkhorn(scores, valid, epsilon=epsilon, iterations=iterations))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


def test_rows_that_are_not_valid_take_no_part() -> None:
    scores, valid = scores_of(9), torch.arange(9) % 3 > 0
    codes = sinkhorn(scores[None], valid[None], epsilon=0.05, iterations=3)[0]
    assert torch.allclose(codes[valid], codes_of(scores[valid]), atol=1e-14) and not codes[~valid].any()
    nobody = sinkhorn(scores[None], torch.zeros(1, 9, dtype=torch.bool), epsilon=0.05, iterations=3)
    assert not nobody.any()


def test_views_are_balanced_each_or_in_groups() -> None:
    views = torch.stack([scores_of(6, seed=1), scores_of(6, seed=2), scores_of(6, seed=3)])
    valid = torch.ones(3, 6, dtype=torch.bool)
    each = sinkhorn(views, valid, epsilon=0.05, iterations=3)
    assert all(torch.allclose(each[i], codes_of(views[i]), atol=1e-14) for i in range(3))
    grouped = sinkhorn(views, valid, epsilon=0.05, iterations=3, groups=[7, 2, 7])
    together = codes_of(torch.cat([views[0], views[2]]))
    assert torch.allclose(torch.cat([grouped[0], grouped[2]]), together, atol=1e-14)
    assert torch.allclose(grouped[1], codes_of(views[1]), atol=1e-14)


def shares_of(rank: int, masses: Tensor, groups: list[int] | None) -> tuple[Tensor, Tensor, float]:
    """As they are, as log-sum-exps of what a gather brings, and the bytes that this rank sends for the first."""
    traffic = Traffic()
    with traffic.counted():
        found = module._shares(masses[rank], groups)
    gathered = gather_stacked(masses[rank]).logsumexp(dim=0)
    if groups is not None:
        number = torch.tensor(groups)
        gathered = torch.stack([gathered[number == group].logsumexp(dim=0) for group in groups])
    return found, -gathered.masked_fill(gathered == -torch.inf, 0.0), traffic.sent


@pytest.mark.parametrize("groups", [None, [0, 1, 0]])
def test_shares_over_ranks_are_those_of_a_gather_at_bytes_that_do_not_grow_with_the_ranks(
    groups: list[int] | None, pool2: GlooPool, pool4: GlooPool
) -> None:
    for pool in (pool2, pool4):
        masses = 300 * scores_of(pool.world * 3, 7).view(pool.world, 3, 7)  # beyond what exponentials bear
        masses[0, 1], masses[:, 2, 3] = -torch.inf, -torch.inf  # no row on a rank, none on any
        for found, gathered, sent in pool.run(shares_of, [(rank, masses, groups) for rank in range(pool.world)]):
            assert torch.allclose(found, gathered, rtol=1e-12, atol=1e-12) and bool(found.isfinite().all())
            assert sent == 2 * 2 * (pool.world - 1) / pool.world * 3 * 7 * 8
    assert not module._shares(torch.full((2, 3), -torch.inf), None).any()


def share(scores: Tensor, valid: Tensor, groups: list[int] | None) -> Tensor:
    return sinkhorn(scores, valid, epsilon=0.05, iterations=3, groups=groups)


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3), (7, 1), (8, 0), (3, 0, 5)])
@pytest.mark.parametrize("groups", [None, [0, 0]])
def test_uneven_ranks_are_one_process(
    sizes: tuple[int, ...], groups: list[int] | None, request: pytest.FixtureRequest
) -> None:
    """The published form divides by this rank's rows times the ranks: off by .13 for 5 + 3 rows, by .55 for 7 + 1."""
    pool: GlooPool = request.getfixturevalue(f"pool{len(sizes)}")
    views = torch.stack([scores_of(8, seed=1), scores_of(8, seed=2)])
    valid = torch.tensor([[True] * 8, [True, False] * 4])
    whole = sinkhorn(views, valid, epsilon=0.05, iterations=3, groups=groups)
    parts = zip(views.split(list(sizes), dim=1), valid.split(list(sizes), dim=1), strict=True)
    found = torch.cat(pool.run(share, [(part, there, groups) for part, there in parts]), dim=1)
    assert torch.allclose(found, whole, rtol=0, atol=1e-13)
