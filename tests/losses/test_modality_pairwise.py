"""ModalityPairwiseLoss against CLIP, its definition written out, and the published code's arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses import ModalityPairwiseLoss, PairwiseCLIPLoss
from tests.losses.cases import random_presence, unit_rows

ABC = ("a", "b", "c")


def unit_views(names: tuple[str, ...], n: int, v: int, d: int, seed: int = 0) -> dict[str, Tensor]:
    rows = unit_rows(names, n * v, d, seed)
    return {name: tensor.view(n, v, d) for name, tensor in rows.items()}


def literal(views: dict[str, Tensor], positives: str, exclude_aligned: bool, scale: float) -> float:
    """Anchor by anchor."""
    total, pairs = 0.0, list(itertools.permutations(views, 2))
    for a, b in pairs:
        n, v, _ = views[a].shape
        for i, s in itertools.product(range(n), range(v)):
            logits = {
                (j, w): scale * float(views[a][i, s] @ views[b][j, w])
                for j, w in itertools.product(range(n), range(v))
                if not (exclude_aligned and (j, w) == (i, s))
            }
            right = {"aligned": [s], "other_view": [w for w in range(v) if w != s], "all": list(range(v))}[positives]
            wanted = sum(logits[i, w] for w in right) / len(right)
            total += (math.log(sum(math.exp(x) for x in logits.values())) - wanted) / (n * v * len(pairs))
    return total


@pytest.mark.parametrize("v", [2, 3])
@pytest.mark.parametrize(
    ("positives", "exclude"), [("aligned", False), ("other_view", False), ("other_view", True), ("all", False)]
)
def test_equals_its_definition(positives: str, exclude: bool, v: int) -> None:
    views = unit_views(ABC, 4, v, 5)
    loss = ModalityPairwiseLoss(positives=positives, exclude_aligned=exclude, init_temperature=0.2).double()
    expected = literal(views, positives, exclude, float(loss.scale))
    assert float(loss(views).loss) == pytest.approx(expected, abs=1e-12)


def test_one_view_of_two_modalities_is_clip() -> None:
    rows, present = unit_rows(("a", "b"), 9, 6), random_presence(("a", "b"), 9)
    expected = PairwiseCLIPLoss().double()(rows, present).loss.detach()
    found = ModalityPairwiseLoss(positives="aligned").double()
    assert torch.allclose(found(rows, present).loss, expected, rtol=0, atol=1e-12)
    with_views = {name: tensor[:, None] for name, tensor in rows.items()}
    assert torch.allclose(found(with_views, present).loss, expected, rtol=0, atol=1e-12)


def test_the_papers_code_is_half_of_infonce_over_the_other_window() -> None:
    """Its masks, after SupCon: logits of all 2B anchors against all 2B columns, the diagonal taken out as "self", and the
    log-probability of the one positive divided by the number of positives plus one."""
    loss = ModalityPairwiseLoss(positives="other_view", exclude_aligned=True, legacy_scale=0.5).double()
    views = unit_views(("a", "b"), 6, 2, 8)
    terms = []
    for a, b in (("a", "b"), ("b", "a")):
        anchors, contrast = (torch.cat(views[name].unbind(dim=1)) for name in (a, b))  # window by window
        logits = anchors @ contrast.T * loss.scale
        same_sample = torch.eye(6, dtype=torch.float64).repeat(2, 2)
        not_self = 1 - torch.eye(12, dtype=torch.float64)
        positive = same_sample * not_self
        log_prob = logits - (logits.exp() * not_self).sum(dim=1, keepdim=True).log()
        terms.append(-((positive * log_prob).sum(dim=1) / (positive.sum(dim=1) + 1)).mean())
    expected = torch.stack(terms).mean()
    assert torch.allclose(loss(views).loss, expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 4), st.integers(2, 3), st.integers(0, 99))
def test_order_of_samples_views_and_modalities_does_not_matter(n: int, m: int, v: int, seed: int) -> None:
    names = tuple(f"m{i}" for i in range(m))
    views, present = unit_views(names, n, v, 6, seed), random_presence(names, n, seed)
    loss = ModalityPairwiseLoss(exclude_aligned=True).double()
    generator = torch.Generator().manual_seed(seed)
    order, turn = torch.randperm(n, generator=generator), torch.randperm(v, generator=generator)
    moved = {name: views[name][order][:, turn] for name in reversed(names)}
    found = loss(moved, {name: present[name][order] for name in names}).loss
    assert torch.allclose(loss(views, present).loss, found, atol=1e-11)


def test_an_incomplete_sample_is_as_if_it_were_not_there() -> None:
    for seed in range(8):
        views, present = unit_views(("a", "b"), 7, 2, 6, seed), random_presence(("a", "b"), 7, seed)
        both = present["a"] & present["b"]
        loss = ModalityPairwiseLoss().double()
        expected = float(loss({name: tensor[both] for name, tensor in views.items()}).loss) if both.any() else 0.0
        assert float(loss(views, present).loss) == pytest.approx(expected, abs=1e-12)


def test_a_modality_with_one_view_lends_it_to_all() -> None:
    views = unit_views(("a", "b"), 5, 2, 6)
    single = {"a": views["a"], "b": views["b"][:, :1]}
    twice = {"a": views["a"], "b": views["b"][:, :1].expand(-1, 2, -1)}
    loss = ModalityPairwiseLoss().double()
    assert torch.allclose(loss(single).loss, loss(twice).loss, rtol=0, atol=1e-12)
    assert torch.allclose(loss({**single, "b": views["b"][:, 0]}).loss, loss(twice).loss, rtol=0, atol=1e-12)


def test_weights_of_ordered_pairs() -> None:
    views = unit_views(("a", "b"), 5, 2, 6)
    parts = ModalityPairwiseLoss().double()(views).parts
    loss = ModalityPairwiseLoss(weights=[[0, 3], [1, 0]], modalities=["a", "b"]).double()
    expected = (3 * parts["a-b"] + parts["b-a"]) / 4
    assert float(loss(views).loss) == pytest.approx(float(expected), abs=1e-12)
    one_way = ModalityPairwiseLoss(weights=[[0, 3], [0, 0]], modalities=["a", "b"]).double()(views)
    assert float(one_way.loss) == pytest.approx(float(parts["a-b"]), abs=1e-12) and set(one_way.parts) == {"a-b"}


def test_gradcheck() -> None:
    views = unit_views(("a", "b"), 3, 2, 3)
    loss = ModalityPairwiseLoss(init_temperature=0.5, exclude_aligned=True).double()
    leaves = [views[name].clone().requires_grad_() for name in views]
    assert torch.autograd.gradcheck(lambda a, b: loss({"a": a, "b": b}).loss, leaves)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(half: torch.dtype) -> None:
    views = unit_views(("a", "b"), 32, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = float(ModalityPairwiseLoss()({name: tensor.to(half) for name, tensor in views.items()}).loss)
    assert found == pytest.approx(float(ModalityPairwiseLoss().double()(views).loss), rel=1e-2)


def test_score_is_that_of_clip() -> None:
    rows = unit_rows(ABC, 5, 6)
    given = {"a": rows["a"], "b": rows["b"]}
    found = ModalityPairwiseLoss().double().score(target="c", candidates=rows["c"], given=given)
    expected = PairwiseCLIPLoss().double().score(target="c", candidates=rows["c"], given=given)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positives": "alligned"}, "did you mean 'aligned'"),
        ({"positives": "all", "exclude_aligned": True}, "leaves out a positive"),
        ({"legacy_scale": 0.0}, "legacy_scale"),
        ({"init_temperature": -1.0}, "must be positive"),
        ({"modalities": ["a"]}, "at least 2 modalities"),
        ({"weights": [[0, 1], [1, 0]]}, "needs modalities"),
        ({"weights": [[1, 0], [0, 1]], "modalities": ["a", "b"]}, "not all 0"),  # no pair of two modalities
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModalityPairwiseLoss(**options)


def test_impossible_batches_are_refused() -> None:
    rows = unit_rows(("a", "b"), 4, 6)
    with pytest.raises(LossError, match=r"other views.*views: 2"):
        ModalityPairwiseLoss().double()(rows)
    assert torch.allclose(  # in evaluation a sample comes once
        ModalityPairwiseLoss().double().eval()(rows).loss, PairwiseCLIPLoss().double()(rows).loss
    )
    three = F.normalize(torch.randn(4, 3, 6, dtype=torch.float64), dim=2)
    with pytest.raises(LossError, match="unequal numbers of views"):
        ModalityPairwiseLoss().double()({"a": three, "b": three[:, :2]})
    with pytest.raises(LossError, match="at least 2"):
        ModalityPairwiseLoss()({"a": three})
