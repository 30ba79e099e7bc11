"""SymileLoss against the published package, CLIP, literal sums and its own symmetries."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses import PairwiseCLIPLoss, SymileLoss
from tests.losses.cases import random_presence, unit_rows

NAMES = ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_shuffled_negatives_equal_the_published_package_given_its_permutations(
    dtype: torch.dtype, tolerance: float
) -> None:
    from symile import Symile

    for m in (3, 4, 5):
        rows, drawn = {name: tensor.to(dtype) for name, tensor in unit_rows(NAMES[:m], 7, 16).items()}, []

        def recorded(n: int, drawn: list[Tensor] = drawn) -> Tensor:
            drawn.append(torch.tensor([(3 * len(drawn) + 5 * i + 1) % n for i in range(n)]))
            return drawn[-1]

        loss = SymileLoss(init_logit_scale=math.log(4)).to(dtype)
        with patch("torch.randperm", recorded):
            expected = Symile("n")(list(rows.values()), loss.scale.detach())
        draws = iter(drawn)
        permutations = {anchor: {o: next(draws) for o in NAMES[:m] if o != anchor} for anchor in NAMES[:m]}
        assert torch.allclose(loss(rows, permutations=permutations).loss, expected, rtol=0, atol=tolerance), m


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("m", [3, 4, 5])
def test_all_negatives_equal_the_published_package(m: int, dtype: torch.dtype, tolerance: float) -> None:
    from symile import Symile

    rows = {name: tensor.to(dtype) for name, tensor in unit_rows(NAMES[:m], 5, 8).items()}
    loss = SymileLoss(negatives="all", init_logit_scale=math.log(4)).to(dtype)
    expected = Symile("n_squared")(list(rows.values()), loss.scale.detach())
    assert torch.allclose(loss(rows).loss, expected, rtol=0, atol=tolerance)


def test_all_anchors_share_one_cube() -> None:
    """One N x N x N tensor of logits and a log-sum-exp over each axis give the published n_squared loss."""
    rows = unit_rows(NAMES[:3], 6, 8)
    loss = SymileLoss(negatives="all", init_logit_scale=math.log(4)).double()
    cube = loss.scale.detach() * torch.einsum("id,jd,kd->ijk", *rows.values())
    positive = torch.stack([cube[i, i, i] for i in range(6)])
    terms = [(cube.transpose(0, axis).flatten(1).logsumexp(dim=1) - positive).mean() for axis in range(3)]
    assert torch.allclose(loss(rows).loss, torch.stack(terms).mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_all_negatives_equal_a_literal_sum(m: int) -> None:
    n, names = 4, NAMES[:m]
    rows = unit_rows(names, n, 6)
    loss, total = SymileLoss(negatives="all", init_logit_scale=math.log(4)).double(), 0.0
    scale = loss.scale.detach()
    for anchor, i in itertools.product(names, range(n)):
        others = [name for name in names if name != anchor]
        logits = []
        for combination in itertools.product(range(n), repeat=m - 1):
            product = rows[anchor][i].clone()
            for name, j in zip(others, combination, strict=True):
                product = product * rows[name][j]
            logits.append(scale * product.sum())
        positive = scale * torch.stack([rows[name][i] for name in names]).prod(0).sum()
        total += float(torch.stack(logits).logsumexp(0) - positive)
    assert float(loss(rows).loss) == pytest.approx(total / (m * n), abs=1e-12)


@pytest.mark.parametrize("negatives", ["shuffled", "all"])
def test_two_modalities_are_clip(negatives: str) -> None:
    rows, present = unit_rows(("a", "b"), 9, 6), random_presence(("a", "b"), 9)
    expected = PairwiseCLIPLoss(init_temperature=0.1).double()(rows, present).loss
    found = SymileLoss(negatives=negatives, init_logit_scale=math.log(10)).double()(rows, present).loss
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 999))
def test_no_column_holds_a_true_tuple(n: int, m: int, seed: int) -> None:
    """The others of column j all from one sample would be a false negative (n = 1 has no negatives at all)."""
    loss = SymileLoss(seed=seed)
    names = [f"m{i}" for i in range(m)]
    for anchor, shifts in loss._shifts(names, n, torch.device("cpu")).items():
        assert set(shifts) == set(names) - {anchor}
        columns = torch.stack(list(shifts.values()))
        assert all(sorted(column.tolist()) == list(range(n)) for column in columns)
        if m == 2:
            assert columns[0].tolist() == list(range(n))
        elif n > 1:
            assert bool((columns != columns[0]).any(dim=0).all())
        if n >= m - 1:
            assert all(bool((x != y).all()) for x, y in itertools.combinations(columns, 2))


def test_negatives_change_in_training_and_stay_in_evaluation() -> None:
    rows = unit_rows(NAMES[:3], 12, 8)
    loss = SymileLoss(init_logit_scale=3.0).double()
    assert len({float(loss(rows).loss) for _ in range(4)}) > 1
    loss.eval()
    assert len({float(loss(rows).loss) for _ in range(4)}) == 1
    again = SymileLoss(init_logit_scale=3.0).double()
    again.load_state_dict(loss.state_dict())
    assert float(again.train()(rows).loss) == float(loss.train()(rows).loss)  # a resumed run draws the same negatives


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(2, 4), st.integers(0, 99))
def test_order_of_samples_and_modalities_does_not_matter(n: int, m: int, seed: int) -> None:
    names = list(NAMES[:m])
    rows, present = unit_rows(names, n, 6, seed), random_presence(names, n, seed)
    loss = SymileLoss(negatives="all", init_logit_scale=1.0).double()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = {name: rows[name][order] for name in reversed(names)}
    found = loss(moved, {name: present[name][order] for name in names}).loss
    assert torch.allclose(loss(rows, present).loss, found, atol=1e-12)


@pytest.mark.parametrize("negatives", ["shuffled", "all"])
def test_an_incomplete_sample_is_as_if_it_were_not_there(negatives: str) -> None:
    for seed in range(8):
        rows, present = unit_rows(NAMES[:3], 7, 6, seed), random_presence(NAMES[:3], 7, seed)
        complete = present["a"] & present["b"] & present["c"]
        loss = SymileLoss(negatives=negatives, init_logit_scale=2.0).double().eval()
        expected = loss({name: tensor[complete] for name, tensor in rows.items()}).loss if complete.any() else 0.0
        assert float(loss(rows, present).loss) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("negatives", ["shuffled", "all"])
def test_gradcheck(negatives: str) -> None:
    rows = unit_rows(NAMES[:3], 4, 3)
    loss = SymileLoss(negatives=negatives, init_logit_scale=0.7).double().eval()

    def value(a: Tensor, b: Tensor, c: Tensor, scale: Tensor) -> Tensor:
        state = {"logit_scale": scale, "step": loss.step, "scale_is_set": loss.scale_is_set}
        result: Tensor = torch.func.functional_call(loss, state, ({"a": a, "b": b, "c": c},)).loss
        return result

    leaves = [rows[name].clone().requires_grad_() for name in rows]
    assert torch.autograd.gradcheck(value, (*leaves, loss.logit_scale.detach().clone().requires_grad_()))


@pytest.mark.parametrize(("m", "d"), [(2, 64), (3, 128), (5, 64), (8, 256)])
@pytest.mark.parametrize("normalisation", ["l2", "layernorm"])
def test_scale_starts_where_logits_of_unrelated_rows_have_deviation_3(m: int, d: int, normalisation: str) -> None:
    rows = unit_rows([f"m{i}" for i in range(m)], 400, d)
    if normalisation == "layernorm":
        rows = {name: tensor * math.sqrt(d) for name, tensor in rows.items()}
    loss = SymileLoss().double()
    loss(rows)
    products = torch.stack(list(rows.values())).prod(0).sum(-1)
    assert float((loss.scale * products).std()) == pytest.approx(3, rel=0.2)
    assert bool(loss.scale_is_set)
    expected = 0.5 * (m - 1) * math.log(d) if normalisation == "l2" else -0.5 * math.log(d)
    assert float(loss.logit_scale) == pytest.approx(math.log(3) + expected, abs=1e-9)


def test_products_of_eight_half_precision_rows_do_not_underflow() -> None:
    names = [f"m{i}" for i in range(8)]
    rows = {name: tensor.half() for name, tensor in unit_rows(names, 6, 8192).items()}
    loss = SymileLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(rows).loss
    wide = SymileLoss(init_logit_scale=float(loss.logit_scale)).double()
    shifts = SymileLoss()._shifts(names, 6, torch.device("cpu"))
    expected = wide({name: tensor.double() for name, tensor in rows.items()}, permutations=shifts).loss
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("m", [3, 8])
def test_gradients_of_wide_products_are_those_of_float64(m: int) -> None:
    names = [f"m{i}" for i in range(m)]
    rows = unit_rows(names, 6, 8192)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        leaves = {name: tensor.clone().to(dtype).requires_grad_() for name, tensor in rows.items()}
        SymileLoss().to(dtype)(leaves).loss.backward()
        gradients.append(torch.stack([leaf.grad.double() for leaf in leaves.values() if leaf.grad is not None]))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-4


def placeholder(names: tuple[str, ...] = NAMES[:3], **options: Any) -> SymileLoss:
    loss = SymileLoss(missing="placeholder", init_logit_scale=1.5, modalities=names, embed_dim=6, **options).double()
    assert loss.placeholders is not None
    torch.manual_seed(3)
    for name in names:
        torch.nn.init.normal_(loss.placeholders.observed[name])
    return loss


def filled(loss: SymileLoss, rows: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows that stand for unit rows, written out."""
    assert loss.placeholders is not None
    missing, observed = loss.placeholders.missing, loss.placeholders.observed
    return {
        name: torch.nn.functional.normalize(
            torch.stack(
                [r + observed[name] if there else missing[name] for r, there in zip(rs, present[name], strict=True)]
            ),
            dim=1,
        )
        for name, rs in rows.items()
    }


@pytest.mark.parametrize("negatives", ["shuffled", "all"])
def test_placeholders_stand_for_what_is_missing(negatives: str) -> None:
    rows, present = unit_rows(NAMES[:3], 7, 6), random_presence(NAMES[:3], 7, 2)
    some = torch.stack(list(present.values())).any(dim=0)
    loss = placeholder(negatives=negatives).eval()
    whole = SymileLoss(negatives=negatives, init_logit_scale=1.5).double().eval()
    expected = whole({name: r[some] for name, r in filled(loss, rows, present).items()}).loss
    output = loss(rows, present)
    assert torch.allclose(output.loss, expected, rtol=0, atol=1e-12)
    assert float(output.metrics["tuples"]) == pytest.approx(float(some.double().mean()))
    output.loss.backward()
    assert loss.placeholders is not None
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in loss.placeholders.parameters())


def test_placeholders_score_with_whatever_is_given() -> None:
    rows, loss = unit_rows(NAMES[:3], 5, 6), placeholder()
    everything = dict.fromkeys(NAMES[:3], torch.ones(5, dtype=torch.bool))
    whole = filled(loss, rows, everything)
    present = {"a": torch.tensor([True, True, False, True, True])}
    only_a = filled(loss, rows, {**everything, **present, "b": torch.zeros(5, dtype=torch.bool)})
    found = loss.score(target="c", candidates=rows["c"], given={"a": rows["a"]}, present=present)
    expected = loss.scale * (only_a["a"] * only_a["b"]) @ whole["c"].T
    assert torch.allclose(found, expected, atol=1e-12)
    both = loss.score(target="c", candidates=rows["c"], given={"a": rows["a"], "b": rows["b"]})
    assert torch.allclose(both, loss.scale * (whole["a"] * whole["b"]) @ whole["c"].T, atol=1e-12)


def test_a_pairwise_term_is_added_and_ranks_where_not_all_is_given() -> None:
    rows = unit_rows(NAMES[:3], 6, 8)
    loss = SymileLoss(init_logit_scale=1.5, pairwise_weight=0.7, modalities=NAMES[:3]).double().eval()
    product = SymileLoss(init_logit_scale=1.5).double().eval()
    expected = product(rows).loss + 0.7 * PairwiseCLIPLoss().double()(rows).loss
    assert torch.allclose(loss(rows).loss, expected, rtol=0, atol=1e-9)
    assert {"a", "b", "c", "a-b", "a-c", "b-c"} == set(loss(rows).parts)
    given = {"a": rows["a"], "b": rows["b"]}
    joint = loss.score(target="c", candidates=rows["c"], given=given)
    assert torch.allclose(joint, product.score(target="c", candidates=rows["c"], given=given), atol=1e-12)
    single = loss.score(target="c", candidates=rows["c"], given={"a": rows["a"]})
    assert loss.pairwise is not None
    assert torch.allclose(single, loss.pairwise.scale * rows["a"] @ rows["c"].T, atol=1e-12)
    present = {"a": torch.arange(6) > 0, "b": torch.ones(6, dtype=torch.bool)}
    mixed = loss.score(target="c", candidates=rows["c"], given=given, present=present)
    assert torch.allclose(mixed[1:], joint[1:], atol=1e-12)
    assert torch.allclose(mixed[0], loss.pairwise.scale * rows["b"][0] @ rows["c"].T, atol=1e-12)


def test_score_is_the_product() -> None:
    rows = unit_rows(NAMES[:3], 5, 8)
    loss = SymileLoss(init_logit_scale=math.log(7)).double()
    scores = loss.score(target="c", candidates=rows["c"], given={"a": rows["a"], "b": rows["b"]})
    expected = 7 * torch.einsum("qd,qd,cd->qc", rows["a"], rows["b"], rows["c"])
    assert torch.allclose(scores, expected, atol=1e-12)
    present = {"a": torch.tensor([True, True, False, True, True]), "b": torch.ones(5, dtype=torch.bool)}
    partly = loss.score(target="c", candidates=rows["c"], given={"a": rows["a"], "b": rows["b"]}, present=present)
    assert torch.allclose(partly[2], 7 * rows["b"][2] @ rows["c"].T, atol=1e-12)


def test_impossible_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose from: shuffled, all"):
        SymileLoss(negatives="n")
    with pytest.raises(ConfigError, match="did you mean 'placeholder'"):
        SymileLoss(missing="placeholders")
    with pytest.raises(ConfigError, match="needs modalities and embed_dim"):
        SymileLoss(missing="placeholder")
    with pytest.raises(ConfigError, match="pairwise_weight needs modalities"):
        SymileLoss(pairwise_weight=1.0)
    with pytest.raises(ConfigError, match="must not be negative"):
        SymileLoss(pairwise_weight=-1.0)
    with pytest.raises(LossError, match="at least 2"):
        SymileLoss()({"a": torch.zeros(3, 4)})
    with pytest.raises(LossError, match="NaN or infinity: 'a' in 3 samples"):
        SymileLoss()({"a": torch.full((3, 4), math.nan), "b": torch.zeros(3, 4)})
