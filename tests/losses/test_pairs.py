"""Which pairs PairwiseCLIPLoss contrasts, in which form, and with which scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses import PairwiseCLIPLoss
from tests.losses.cases import random_presence, unit_rows

ABC = ("a", "b", "c")


def pair(rows: dict[str, Tensor], a: str, b: str, **options: Any) -> Tensor:
    return PairwiseCLIPLoss(**options).double()({"x": rows[a], "y": rows[b]}).loss.detach()


def close(found: Tensor, expected: Tensor | float) -> bool:
    return float(found.detach()) == pytest.approx(float(expected), abs=1e-12)


def test_a_star_has_the_anchors_pairs_only() -> None:
    rows = unit_rows(ABC, 6, 8)
    output = PairwiseCLIPLoss(anchor="b").double()(rows)
    assert set(output.parts) == {"a-b", "b-c"}
    assert close(output.loss, (pair(rows, "a", "b") + pair(rows, "b", "c")) / 2)


def test_a_pair_that_the_batch_lacks_counts_as_zero_and_has_no_part() -> None:
    rows = unit_rows(ABC, 6, 8)
    present = {name: torch.full((6,), name != "c") for name in ABC}
    output = PairwiseCLIPLoss().double()(rows, present)
    assert set(output.parts) == {"a-b"} and close(output.loss, pair(rows, "a", "b") / 3)


def test_a_list_and_weights_with_mean_and_sum() -> None:
    rows = unit_rows(ABC, 6, 8)
    ab, cb = pair(rows, "a", "b"), pair(rows, "c", "b")
    assert close(PairwiseCLIPLoss(pairs=["a-b", "c-b"]).double()(rows).loss, (ab + cb) / 2)
    weights: dict[str, float] = {"a-b": 3.0, "c-b": 0.5}
    assert close(PairwiseCLIPLoss(pairs=weights).double()(rows).loss, (3 * ab + 0.5 * cb) / 3.5)
    assert close(PairwiseCLIPLoss(pairs=weights, reduction="sum").double()(rows).loss, 3 * ab + 0.5 * cb)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_both_forms_equal_open_clip(dtype: torch.dtype, tolerance: float) -> None:
    from open_clip.loss import ClipLoss, SigLipLoss

    rows = {name: tensor.to(dtype) for name, tensor in unit_rows(("a", "b"), 12, 8).items()}
    clip, siglip = PairwiseCLIPLoss().to(dtype), PairwiseCLIPLoss(form="sigmoid").to(dtype)
    expected = ClipLoss()(rows["a"], rows["b"], clip.scale.detach())
    assert float(clip(rows).loss.detach()) == pytest.approx(float(expected), abs=tolerance)
    expected = SigLipLoss()(rows["a"], rows["b"], siglip.scale.detach(), siglip.logit_bias.detach())
    assert float(siglip(rows).loss.detach()) == pytest.approx(float(expected), abs=tolerance, rel=tolerance)


def test_the_sigmoid_form_starts_as_published_and_leaves_absent_rows_out() -> None:
    rows, present = unit_rows(("a", "b"), 9, 6), random_presence(("a", "b"), 9, 4)
    loss = PairwiseCLIPLoss(form="sigmoid").double()
    assert float(loss.scale.detach()) == pytest.approx(10) and float(loss.logit_bias.detach()) == -10
    both = present["a"] & present["b"]
    logits = loss.scale * (rows["a"][both] @ rows["b"][both].T) + loss.logit_bias
    signs = 2 * torch.eye(int(both.sum()), dtype=torch.float64) - 1
    assert close(loss(rows, present).loss, -F.logsigmoid(signs * logits).sum() / both.sum())
    loss(rows, present).loss.backward()
    assert loss.logit_bias.grad is not None and bool(loss.logit_bias.grad.abs() > 0)


def test_gradcheck_of_the_sigmoid_form_with_a_scale_per_pair() -> None:
    rows = unit_rows(ABC, 4, 3)
    loss = PairwiseCLIPLoss(form="sigmoid", scale_per_pair=True, modalities=ABC, init_bias=-1.0).double()

    def value(a: Tensor, b: Tensor, c: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        state = {"logit_scale": scale, "logit_bias": bias}
        result: Tensor = torch.func.functional_call(loss, state, ({"a": a, "b": b, "c": c},)).loss
        return result

    leaves = [*rows.values(), loss.logit_scale, loss.logit_bias]
    assert torch.autograd.gradcheck(value, [leaf.detach().clone().requires_grad_() for leaf in leaves])


def test_a_scale_per_pair() -> None:
    rows = unit_rows(ABC, 6, 8)
    loss = PairwiseCLIPLoss(scale_per_pair=True, modalities=ABC, pairs=["a-b", "c-b"]).double()
    with torch.no_grad():
        loss.logit_scale.copy_(torch.tensor([math.log(5.0), math.log(20.0)]))
    ab, cb = pair(rows, "a", "b", init_temperature=1 / 5), pair(rows, "c", "b", init_temperature=1 / 20)
    assert float(loss(rows).loss.detach()) == pytest.approx(float(ab + cb) / 2, abs=1e-6)
    scores = loss.score(target="b", candidates=rows["b"], given={"a": rows["a"], "c": rows["c"]})
    assert torch.allclose(scores, (5 * rows["a"] + 20 * rows["c"]) @ rows["b"].T, atol=1e-5)
    untrained = loss.score(target="c", candidates=rows["c"], given={"a": rows["a"]})  # they met at b
    assert torch.allclose(untrained, 12.5 * rows["a"] @ rows["c"].T, atol=1e-5)


def test_views_are_batches_of_their_own() -> None:
    views = {name: tensor.view(5, 2, 6) for name, tensor in unit_rows(ABC, 10, 6).items()}
    loss = PairwiseCLIPLoss().double()
    expected = torch.stack([loss({name: v[:, n] for name, v in views.items()}).loss for n in range(2)]).mean()
    assert close(loss(views).loss, expected)
    lent = {**views, "c": views["c"][:, 0]}
    twice = {**views, "c": views["c"][:, :1].expand(-1, 2, -1)}
    assert close(loss(lent).loss, loss(twice).loss)
    with pytest.raises(LossError, match="unequal numbers of views"):
        loss({**views, "c": torch.cat([views["c"], views["c"][:, :1]], dim=1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": []}, "name some pairs"),
        ({"pairs": {}}, "name some pairs"),
        ({"pairs": ["a-b"], "anchor": "a"}, "not both"),
        ({"pairs": "al"}, "pairs='al'"),
        ({"pairs": ["ab"]}, "'ab' is no pair"),
        ({"pairs": ["a-a"]}, "'a-a' is no pair"),
        ({"pairs": ["a-b", "b-a"]}, "named twice"),
        ({"pairs": {"a-b": 0.0}}, "weight of a-b is 0"),
        ({"pairs": ["image-txt"], "modalities": ["image", "text"]}, "no modality 'txt'.*did you mean 'text'"),
        ({"anchor": "images", "modalities": ["image", "text"]}, "anchor: no modality 'images'.*'image'"),
        ({"modalities": ["image"]}, "at least 2 modalities"),
        ({"form": "softmaks"}, "did you mean 'softmax'"),
        ({"scale_per_pair": True}, "give modalities"),
        ({"init_temperature": 0.0}, "must be positive"),
        ({"max_logit_scale": -1.0}, "must be positive"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PairwiseCLIPLoss(**options)


def test_impossible_batches_are_refused() -> None:
    rows = unit_rows(("image", "text"), 4, 3)
    with pytest.raises(LossError, match="contrasts 'audio', which does not come"):
        PairwiseCLIPLoss(pairs=["image-audio"])(rows)
    with pytest.raises(LossError, match=r"contrasts 'txt'.*did you mean 'text'"):
        PairwiseCLIPLoss(anchor="txt")(rows)
    with pytest.raises(LossError, match="knows no modality 'text'"):
        PairwiseCLIPLoss(modalities=["image", "sound"])(rows)
    for bad in (math.nan, math.inf):
        broken = {name: tensor.clone() for name, tensor in rows.items()}
        broken["text"][1, 0] = bad
        with pytest.raises(LossError, match="NaN or infinity: 'text' in 1 samples"):
            PairwiseCLIPLoss()(broken)
