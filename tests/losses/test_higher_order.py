"""GRAM, TRIANGLE and ConFu against their definitions written out, and the published losses' known failures."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses import ConFuLoss, GRAMLoss, Loss, PairwiseCLIPLoss, TriangleLoss
from tests.losses.cases import random_presence, unit_rows

ABC = ("a", "b", "c")
ABCD = ("a", "b", "c", "d")


def volumes(anchor: Tensor, others: list[Tensor]) -> Tensor:
    """``sqrt(det G_ij)``, by the explicit M x M determinant of every pair."""
    result = torch.zeros(len(anchor), len(others[0]), dtype=anchor.dtype)
    for i, j in itertools.product(range(len(anchor)), range(len(others[0]))):
        rows = torch.stack([anchor[i], *(other[j] for other in others)])
        result[i, j] = torch.linalg.det(rows @ rows.T).clamp(min=0).sqrt()
    return result


def areas(anchor: Tensor, others: list[Tensor]) -> Tensor:
    """``1/2 sqrt(|u|^2 |v|^2 - (u.v)^2)``, from the differences themselves."""
    u, v = (anchor[:, None] - other[None] for other in others)
    squared = u.square().sum(-1) * v.square().sum(-1) - (u * v).sum(-1).square()
    return squared.clamp(min=0).sqrt() / 2


def anchored(size: Any, rows: dict[str, Tensor], anchors: list[str], scale: float, smoothing: float) -> float:
    terms = []
    for name in anchors:
        logits = -scale * size(rows[name], [rows[other] for other in rows if other != name])
        right = torch.arange(len(logits))
        terms += [F.cross_entropy(each, right, label_smoothing=smoothing) for each in (logits, logits.T)]
    return float(torch.stack(terms).mean())


@pytest.mark.parametrize("names", [("a", "b"), ABC, ABCD])
@pytest.mark.parametrize("anchor", [None, "b"])
def test_gram_equals_its_definition(names: tuple[str, ...], anchor: str | None) -> None:
    rows = unit_rows(names, 6, 8)
    loss = GRAMLoss(anchor=anchor, epsilon=1e-12).double()
    expected = anchored(volumes, rows, [anchor] if anchor else list(names), float(loss.scale.detach()), 0.1)
    assert float(loss(rows).loss.detach()) == pytest.approx(expected, abs=1e-8)
    near = GRAMLoss(anchor=anchor).double()(rows).loss  # the default epsilon moves it little
    assert float(near.detach()) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("anchor", [None, "c"])
@pytest.mark.parametrize("root", [False, True])
def test_triangle_equals_its_definition(anchor: str | None, root: bool) -> None:
    rows = unit_rows(ABC, 6, 8)
    loss = TriangleLoss(anchor=anchor, root=root, epsilon=1e-14).double()

    def size(a: Tensor, others: list[Tensor]) -> Tensor:
        return areas(a, others) if root else 2 * areas(a, others).square()

    expected = anchored(size, rows, [anchor] if anchor else list(ABC), float(loss.scale.detach()), 0.1)
    assert float(loss(rows).loss.detach()) == pytest.approx(expected, abs=1e-10)


def test_gram_of_two_is_the_sine() -> None:
    rows = unit_rows(("a", "b"), 5, 4)
    found = GRAMLoss(epsilon=1e-14).double().size(rows["a"], [rows["b"]])
    assert torch.allclose(found, (1 - (rows["a"] @ rows["b"].T).square()).sqrt(), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [GRAMLoss(), TriangleLoss(), TriangleLoss(root=True)])
def test_aligned_rows_have_finite_gradients(loss: Loss, dtype: torch.dtype) -> None:
    """The published volume is a square root at 0 there: its gradient is NaN, for all three rows, as soon as two agree."""
    rows = unit_rows(ABC, 4, 8)
    for same in (("a", "b"), ABC):
        batch = {name: rows["a" if name in same else name].to(dtype).clone().requires_grad_() for name in ABC}
        output = loss.to(dtype)(batch)
        output.loss.backward()
        for tensor in batch.values():
            assert tensor.grad is not None and bool(tensor.grad.isfinite().all())
    leaf = [rows["a"].clone().requires_grad_() for _ in range(3)]
    volume = torch.linalg.det(torch.stack([torch.stack(leaf, dim=1) @ torch.stack(leaf, dim=2)])).abs().sqrt().sum()
    volume.backward()
    assert not bool(leaf[0].grad.isfinite().all())  # type: ignore[union-attr]  # the published form does fail


def test_gram_in_fp32_is_near_float64_also_where_others_nearly_agree() -> None:
    rows = unit_rows(ABC, 16, 32)
    for spread in (1.0, 1e-2, 1e-3):
        c = F.normalize(rows["b"] + spread * rows["c"], dim=1)
        exact = GRAMLoss().double().size(rows["a"], [rows["b"], c])
        found = GRAMLoss().size(rows["a"].float(), [rows["b"].float(), c.float()])
        assert torch.allclose(found.double(), exact, atol=2e-4)


def confu(names: tuple[str, ...] = ABC, **options: Any) -> ConFuLoss:
    torch.manual_seed(4)
    return ConFuLoss(modalities=names, embed_dim=6, fusion_width=9, **options).double()


@pytest.mark.parametrize("names", [ABC, ABCD])
def test_confu_equals_its_definition(names: tuple[str, ...]) -> None:
    rows = unit_rows(names, 7, 6)
    loss = confu(names, fusion_weight=0.3)
    fused, pairs = [], []
    clip = PairwiseCLIPLoss().double()
    for name in names:
        others = torch.cat([rows[other] for other in names if other != name], dim=1)
        fusion = F.normalize(loss.fusion[name](others), dim=1)
        fused.append(clip({"x": fusion, "y": rows[name]}).loss)
    for a, b in itertools.combinations(names, 2):
        pairs.append(clip({"x": rows[a], "y": rows[b]}).loss)
    expected = (0.3 * sum(fused) + 0.7 * sum(pairs)) / (len(fused) + len(pairs))
    assert torch.allclose(loss(rows).loss, torch.as_tensor(expected), rtol=0, atol=1e-12)
    assert not loss.logit_scale.requires_grad  # as published


def test_confu_without_fusion_is_pairwise_clip() -> None:
    rows = unit_rows(ABC, 7, 6)
    expected = PairwiseCLIPLoss(reduction="sum").double()(rows).loss / 6
    assert torch.allclose(confu(fusion_weight=0.0)(rows).loss, expected, rtol=0, atol=1e-12)


LOSSES: dict[str, Any] = {
    "gram": lambda: GRAMLoss().double(),
    "gram-anchor": lambda: GRAMLoss(anchor="m1").double(),
    "triangle": lambda: TriangleLoss().double(),
    "confu": lambda: ConFuLoss(modalities=["m0", "m1", "m2"], embed_dim=6, fusion_width=5).double(),
}


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(0, 99))
def test_order_of_samples_and_modalities_does_not_matter(name: str, n: int, seed: int) -> None:
    names = ["m0", "m1", "m2"]
    rows, present = unit_rows(names, n, 6, seed), random_presence(names, n, seed)
    loss = LOSSES[name]()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = {key: rows[key][order] for key in reversed(names)}
    found = loss(moved, {key: present[key][order] for key in names}).loss
    assert torch.allclose(loss(rows, present).loss, found, atol=1e-11)


@pytest.mark.parametrize("name", ["gram", "triangle"])
def test_an_incomplete_sample_is_as_if_it_were_not_there(name: str) -> None:
    names = ["m0", "m1", "m2"]
    for seed in range(8):
        rows, present = unit_rows(names, 7, 6, seed), random_presence(names, 7, seed)
        complete = torch.stack(list(present.values())).all(dim=0)
        loss = LOSSES[name]()
        expected = float(loss({key: r[complete] for key, r in rows.items()}).loss.detach()) if complete.any() else 0.0
        assert float(loss(rows, present).loss.detach()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    rows = unit_rows(("m0", "m1", "m2"), 4, 6)
    loss = LOSSES[name]().eval()
    leaves = [tensor.clone().requires_grad_() for tensor in rows.values()]
    assert torch.autograd.gradcheck(lambda a, b, c: loss({"m0": a, "m1": b, "m2": c}).loss, leaves)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_stays_near(name: str, half: torch.dtype) -> None:
    names = ["m0", "m1", "m2"]
    rows = unit_rows(names, 48, 6)
    loss = LOSSES[name]()
    exact = float(loss(rows).loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = float(loss.float()({key: tensor.to(half) for key, tensor in rows.items()}).loss.detach())
    assert found == pytest.approx(exact, rel=1e-2)


def test_scores_are_minus_the_size_of_what_is_given_with_the_candidate() -> None:
    rows = unit_rows(ABCD, 5, 8)
    loss = GRAMLoss(epsilon=1e-12).double()
    scale = float(loss.scale.detach())
    present = {"a": torch.tensor([True, False, True, True, False]), "b": torch.tensor([True, True, False, True, False])}
    given = {"a": rows["a"], "b": rows["b"]}
    found = loss.score(target="d", candidates=rows["d"], given=given, present=present)
    both, only_a, only_b = ([rows["a"], rows["b"]], [rows["a"]], [rows["b"]])
    for query, shown in ((0, both), (1, only_b), (2, only_a), (3, both)):
        expected = -scale * volumes(rows["d"], [tensor[query : query + 1] for tensor in shown])[:, 0]
        assert torch.allclose(found[query], expected, atol=1e-7)
    assert not found[4].any()  # nothing is known: no candidate is better than another
    area = TriangleLoss().double()
    scores = area.score(target="c", candidates=rows["c"], given=given)
    expected = -scale * 2 * areas(rows["c"], [rows["a"], rows["b"]]).square().T
    assert torch.allclose(scores, expected, atol=1e-9)
    with pytest.raises(LossError, match="three corners"):
        area.score(target="c", candidates=rows["c"], given={"a": rows["a"]})


def test_confu_scores_by_fusion_where_all_is_given_and_by_pairs_elsewhere() -> None:
    rows = unit_rows(ABC, 5, 6)
    loss = confu()
    given, scale = {"b": rows["b"], "a": rows["a"]}, float(loss.scale)
    present = {"a": torch.tensor([True, True, False, True, True]), "b": torch.tensor([True] * 4 + [False])}
    found = loss.score(target="c", candidates=rows["c"], given=given, present=present)
    fused = F.normalize(loss.fusion["c"](torch.cat([rows["a"], rows["b"]], dim=1)), dim=1)
    assert torch.allclose(found[[0, 1, 3]], scale * (fused @ rows["c"].T)[[0, 1, 3]], atol=1e-9)
    assert torch.allclose(found[2], scale * rows["b"][2] @ rows["c"].T, atol=1e-9)
    assert torch.allclose(found[4], scale * rows["a"][4] @ rows["c"].T, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TriangleLoss(modalities=ABCD), "three modalities"),
        (
            lambda: GRAMLoss(anchor="text", modalities=["test", "image"]),
            "anchor: no modality 'text'.*did you mean 'test'",
        ),
        (lambda: GRAMLoss(epsilon=0.0), "epsilon=0.0"),
        (lambda: GRAMLoss(label_smoothing=1.0), "label_smoothing"),
        (lambda: GRAMLoss(init_temperature=0.0), "must be positive"),
        (lambda: GRAMLoss(modalities=["a"]), "at least 2"),
        (lambda: ConFuLoss(modalities=["a", "b"], embed_dim=3), "at least 3"),
        (lambda: ConFuLoss(modalities=ABC, embed_dim=3, fusion_weight=1.5), "fusion_weight"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_impossible_batches_are_refused() -> None:
    rows = unit_rows(ABC, 4, 6)
    with pytest.raises(LossError, match="three corners, not 2"):
        TriangleLoss().double()({"a": rows["a"], "b": rows["b"]})
    with pytest.raises(LossError, match="anchor 'text' does not come"):
        GRAMLoss(anchor="text").double()(rows)
    with pytest.raises(LossError, match="'c' does not come"):
        confu()({"a": rows["a"], "b": rows["b"]})
    broken = {name: tensor.clone() for name, tensor in rows.items()}
    broken["c"][1, 2] = torch.nan
    with pytest.raises(
        LossError, match=r"NaN or infinity: 'c' in 1 samples; "
    ):  # and nothing of what was fused from it
        confu()(broken)
