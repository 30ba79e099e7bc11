"""PairwiseCLIPLoss against open_clip, closed forms and its own symmetries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.errors import ConfigError, LossError
from mmrep.losses import PairwiseCLIPLoss
from tests.losses.cases import random_presence, unit_rows


def test_two_modalities_equal_open_clip() -> None:
    from open_clip.loss import ClipLoss

    rows = unit_rows(("a", "b"), 9, 5)
    loss = PairwiseCLIPLoss(init_temperature=0.05).double()
    expected = ClipLoss()(rows["a"], rows["b"], loss.scale.detach())
    assert torch.allclose(loss(rows).loss, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pairs_are_averaged_or_summed(reduction: str) -> None:
    rows = unit_rows(("a", "b", "c", "d"), 6, 8)
    loss = PairwiseCLIPLoss(reduction=reduction).double()
    pairs = [loss({x: rows[x], y: rows[y]}).loss for x, y in itertools.combinations(rows, 2)]
    expected = torch.stack(pairs).sum() / (6 if reduction == "mean" else 1)
    assert torch.allclose(loss(rows).loss, expected, rtol=0, atol=1e-12)
    assert set(loss(rows).parts) == {"a-b", "a-c", "a-d", "b-c", "b-d", "c-d"}


def test_golden_values() -> None:
    """Two orthogonal pairs at scale s: every row is log(1 + exp(-s)); equal rows are ln N."""
    scale = 1 / 0.07
    eye = torch.eye(2, dtype=torch.float64)
    assert float(PairwiseCLIPLoss().double()({"a": eye, "b": eye}).loss) == pytest.approx(
        math.log1p(math.exp(-scale)), abs=1e-9
    )
    same = torch.ones(12, 4, dtype=torch.float64) / 2
    assert float(PairwiseCLIPLoss().double()({"a": same, "b": same}).loss) == pytest.approx(math.log(12), abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(2, 4), st.integers(0, 99))
def test_order_of_samples_and_modalities_does_not_matter(n: int, m: int, seed: int) -> None:
    names = [f"m{i}" for i in range(m)]
    rows, present = unit_rows(names, n, 6, seed), random_presence(names, n, seed)
    loss = PairwiseCLIPLoss().double()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = {name: rows[name][order] for name in reversed(names)}
    moved_present = {name: present[name][order] for name in names}
    assert torch.allclose(loss(rows, present).loss, loss(moved, moved_present).loss, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99))
def test_an_incomplete_sample_is_as_if_it_were_not_there(n: int, seed: int) -> None:
    rows, present = unit_rows(("a", "b"), n, 6, seed), random_presence(("a", "b"), n, seed)
    both = present["a"] & present["b"]
    rows = {name: tensor.requires_grad_() for name, tensor in rows.items()}
    loss = PairwiseCLIPLoss().double()
    masked = loss(rows, present).loss
    masked.backward()
    expected = (
        loss({name: tensor.detach()[both] for name, tensor in rows.items()}).loss if both.any() else torch.tensor(0.0)
    )
    assert float(masked) == pytest.approx(float(expected), abs=1e-12)
    assert all(float(tensor.grad[~both].abs().sum()) == 0 for tensor in rows.values() if tensor.grad is not None)


def test_no_pair_at_all_is_a_zero_that_keeps_the_graph() -> None:
    rows = {name: tensor.requires_grad_() for name, tensor in unit_rows(("a", "b"), 4, 3).items()}
    nothing = torch.zeros(4, dtype=torch.bool)
    loss = PairwiseCLIPLoss()
    output = loss(rows, {"a": nothing, "b": ~nothing})
    output.loss.backward()
    assert float(output.loss) == 0
    assert float(loss.logit_scale.grad) == 0
    assert float(rows["a"].grad.abs().sum() + rows["b"].grad.abs().sum()) == 0


def test_gradcheck() -> None:
    rows = unit_rows(("a", "b", "c"), 5, 3)
    present = random_presence(("a", "b", "c"), 5, 1)
    loss = PairwiseCLIPLoss(init_temperature=0.5).double()

    def value(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(loss, {"logit_scale": scale}, ({"a": a, "b": b, "c": c}, present))
        result: torch.Tensor = output.loss
        return result

    leaves = [rows[name].clone().requires_grad_() for name in rows]
    assert torch.autograd.gradcheck(value, (*leaves, loss.logit_scale.detach().clone().requires_grad_()))


def test_half_precision_rows_are_computed_in_fp32() -> None:
    rows = unit_rows(("a", "b"), 64, 32)
    loss = PairwiseCLIPLoss(init_temperature=0.01).double()
    for half in (torch.bfloat16, torch.float16):
        rounded = {name: tensor.to(half) for name, tensor in rows.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = PairwiseCLIPLoss(init_temperature=0.01)(rounded).loss
        expected = loss({name: tensor.double() for name, tensor in rounded.items()}).loss
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_scale_is_capped_and_can_come_back() -> None:
    """A clamp inside the graph would cut the gradient at the bound, and hold the scale there for good."""
    rows = unit_rows(("a", "b"), 8, 3)
    loss = PairwiseCLIPLoss(init_temperature=0.001).double()
    assert float(loss.scale.detach()) == pytest.approx(100)
    with torch.no_grad():
        loss.logit_scale.fill_(7.0)
    loss(rows).loss.backward()
    assert float(loss.logit_scale.detach()) == pytest.approx(math.log(100))
    assert loss.logit_scale.grad is not None and float(loss.logit_scale.grad) > 0  # random rows want a lower scale


def test_score_sums_over_what_is_given_and_present() -> None:
    rows = unit_rows(("a", "b", "c"), 4, 6)
    loss = PairwiseCLIPLoss(init_temperature=0.1).double()
    present = {"a": torch.tensor([True, False, True, True]), "b": torch.tensor([True, True, False, True])}
    scores = loss.score(target="c", candidates=rows["c"], given={"a": rows["a"], "b": rows["b"]}, present=present)
    expected = 10 * (rows["a"] * present["a"][:, None] + rows["b"] * present["b"][:, None]) @ rows["c"].T
    assert torch.allclose(scores, expected, atol=1e-12)


def test_impossible_input_is_refused() -> None:
    rows = unit_rows(("a", "b"), 4, 3)
    with pytest.raises(LossError, match="at least 2"):
        PairwiseCLIPLoss()({"a": rows["a"]})
    with pytest.raises(LossError, match="one embed_dim"):
        PairwiseCLIPLoss()({"a": rows["a"], "b": rows["b"][:, :2]})
    with pytest.raises(LossError, match="presence of 'b'"):
        PairwiseCLIPLoss()(rows, {"a": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(ConfigError, match="reduction"):
        PairwiseCLIPLoss(reduction="median")
    with pytest.raises(LossError, match="both given and asked"):
        PairwiseCLIPLoss().score(target="a", candidates=rows["a"], given=rows)
    with pytest.raises(LossError, match="nothing is given"):
        PairwiseCLIPLoss().score(target="a", candidates=rows["a"], given={})
