"""ClusterSwapLoss against the published SwAV losses, its definition written out, and what may go wrong with it."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses import ClusterSwapLoss
from mmrep.ops.sinkhorn import sinkhorn
from tests.golden import cluster_swap as golden
from tests.losses.cases import random_presence, unit_rows

ABC = ("a", "b", "c")


def make(modalities: tuple[str, ...] = ("image",), weights: Tensor | None = None, **options: Any) -> ClusterSwapLoss:
    """A float64 loss with given shared prototypes, those of the golden numbers by default."""
    weights = golden.prototypes() if weights is None else weights
    loss = ClusterSwapLoss(modalities=modalities, embed_dim=weights.shape[1], num_prototypes=len(weights), **options)
    loss.double()
    with torch.no_grad():
        for parameter in loss.bank.parameters():
            parameter.copy_(weights)
    return loss


def views(*numbers: int) -> Tensor:
    return torch.stack([golden.features(number) for number in numbers], dim=1)


def value(loss: ClusterSwapLoss, embeddings: dict[str, Tensor], present: dict[str, Tensor] | None = None) -> float:
    return float(loss(embeddings, present).loss.detach())


def test_g1_swav_with_multi_crop() -> None:
    found = value(make(teacher_views=2), {"image": views(*range(6))})
    assert found == pytest.approx(golden.G1_SIX_CROPS_TWO_ASSIGN, abs=1e-12)
    single = make(teacher_views=2).float()({"image": views(*range(6)).float()}).loss
    assert float(single.detach()) == pytest.approx(golden.G1_SIX_CROPS_TWO_ASSIGN, abs=2e-6)


def test_g1b_codes() -> None:
    scores = golden.features(0) @ golden.prototypes().T
    codes = sinkhorn(scores[None], torch.ones(1, golden.B, dtype=torch.bool), epsilon=0.05, iterations=3)[0]
    assert codes[0, :3].tolist() == pytest.approx(golden.G1B_CODES[:3], abs=5e-9)
    assert float(codes[0, 3]) == pytest.approx(golden.G1B_CODES[3], abs=5e-9)
    assert torch.allclose(codes.sum(dim=1), torch.ones(golden.B, dtype=torch.float64), atol=1e-14)


def test_g2_with_a_full_queue_per_crop() -> None:
    loss = make(teacher_views=2, queue_length=16)
    assert loss.queue is not None
    loss.queue.push({f"image_{v}": golden.features(v, rows=16, shift=2.0) for v in (0, 1)})
    assert value(loss, {"image": views(*range(6))}) == pytest.approx(golden.G2_WITH_QUEUE, abs=1e-12)


def test_g3_two_views_of_one_modality_are_one_view_of_two() -> None:
    assert value(make(), {"image": views(0, 1)}) == pytest.approx(golden.G3_TWO_VIEWS, abs=1e-12)
    two = value(make(("image", "text")), {"image": golden.features(0), "text": golden.features(1)})
    assert two == pytest.approx(golden.G3_TWO_VIEWS, abs=1e-12)


def test_g4_three_modalities() -> None:
    rows = {name: golden.features(number) for number, name in enumerate(ABC)}
    assert value(make(ABC), rows) == pytest.approx(golden.G4_THREE_MODALITIES, abs=1e-12)


@pytest.mark.parametrize(
    ("pairs", "expected"), [("cross", golden.G5_CROSS), ("all", golden.G5_ALL), ("intra", golden.G5_INTRA)]
)
def test_g5_three_modalities_with_two_views(pairs: str, expected: float) -> None:
    rows = {name: views(2 * number, 2 * number + 1) for number, name in enumerate(ABC)}
    assert value(make(ABC, pairs=pairs), rows) == pytest.approx(expected, abs=1e-12)
    matrix = [[float({"cross": a != b, "all": True, "intra": a == b}[pairs]) for b in ABC] for a in ABC]
    assert value(make(ABC, pairs=matrix), rows) == pytest.approx(expected, abs=1e-12)


def test_g6_identity_without_and_with_a_queue() -> None:
    eye = torch.eye(32, dtype=torch.float64)
    alone = make(weights=eye)
    assert value(alone, {"image": torch.stack([eye, eye], dim=1)}) == pytest.approx(golden.G6_IDENTITY, abs=1e-12)
    queued = make(weights=eye, teacher_views=2, queue_length=128)
    assert queued.queue is not None
    queued.queue.push({f"image_{v}": torch.eye(128, 32, dtype=torch.float64) for v in (0, 1)})
    # lightly's queue of 128 rows are scores; rows 32 and on are zero, which is what zero features give.
    assert value(queued, {"image": torch.stack([eye, eye], dim=1)}) == pytest.approx(golden.G6_IDENTITY, abs=1e-12)


def test_g7_constant_scores_are_ln_k() -> None:
    same = golden.features(0)[:1].expand(golden.B, -1)
    weights = golden.prototypes()[:1].expand(golden.K, -1)
    assert value(make(weights=weights), {"image": torch.stack([same, same], dim=1)}) == pytest.approx(
        golden.G7_CONSTANT, abs=1e-12
    )


def lightly_loss(**options: Any) -> Any:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"  # it would ask its server
    from lightly.loss.swav_loss import SwaVLoss

    return SwaVLoss(**options)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("queued", [False, True])
def test_equals_lightly(dtype: torch.dtype, tolerance: float, low: int, queued: bool) -> None:
    generator = torch.Generator().manual_seed(low)
    z = F.normalize(torch.randn(16, 2 + low, 6, dtype=torch.float64, generator=generator), dim=2).to(dtype)
    earlier = [F.normalize(torch.randn(32, 6, dtype=torch.float64, generator=generator), dim=1).to(dtype)] * 2
    weights = golden.prototypes().to(dtype)
    scores = [view @ weights.T for view in z.unbind(dim=1)]
    theirs = lightly_loss()(scores[:2], scores[2:], [queue @ weights.T for queue in earlier] if queued else None)
    loss = make(teacher_views=2, queue_length=32 if queued else 0).to(dtype)
    if loss.queue is not None:
        loss.queue.push({f"image_{v}": earlier[v] for v in (0, 1)})
    assert value(loss, {"image": z}) == pytest.approx(float(theirs), rel=tolerance)


@pytest.mark.parametrize("low", range(6))
@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize(("n", "k", "queued"), [(32, 32, False), (32, 32, True), (1, 32, False), (32, 1, False)])
def test_lightlys_own_published_cases(low: int, iterations: int, n: int, k: int, queued: bool) -> None:
    """Its cases are scores; fed as features, with the identity as prototypes, ours has the same scores."""
    rows = torch.eye(n, k, dtype=torch.float64)
    loss = make(
        weights=torch.eye(k, dtype=torch.float64),
        teacher_views=2,
        iterations=iterations,
        queue_length=128 if queued else 0,
    )
    if loss.queue is not None:
        loss.queue.push({f"image_{v}": torch.eye(128, k, dtype=torch.float64) for v in (0, 1)})
    found = value(loss, {"image": torch.stack([rows] * (2 + low), dim=1)})
    assert math.isfinite(found)
    assert found < 0.5 or n == 1  # "almost zero for unit matrix"; a batch of one has no bound there either
    queue = [torch.eye(128, k, dtype=torch.float64)] * 2 if queued else None
    theirs = lightly_loss(sinkhorn_iterations=iterations)([rows] * 2, [rows] * low, queue)
    assert found == pytest.approx(float(theirs), abs=1e-12)


def literal(loss: ClusterSwapLoss, rows: dict[str, Tensor], present: dict[str, Tensor]) -> float:
    """The definition, sample by sample, with codes in the linear domain and prototypes of each assigning modality."""
    total, teachers = 0.0, 0
    for a in rows:
        prototypes = loss.bank(a, 0).detach()
        there = present[a].nonzero()[:, 0].tolist()
        codes = torch.exp(rows[a][there] @ prototypes.T / loss.epsilon)
        for _ in range(loss.iterations if there else 0):
            codes = codes / codes.sum(dim=0, keepdim=True)
            codes = codes / codes.sum(dim=1, keepdim=True)
        terms = []
        for b in rows:
            if b == a:
                continue
            both = [n for n in there if present[b][n]]
            entropies = [
                -float((codes[there.index(n)] * torch.log_softmax(prototypes @ rows[b][n] / loss.temperature, 0)).sum())
                for n in both
            ]
            terms.append(sum(entropies) / max(1, len(both)))
        total, teachers = total + sum(terms) / len(terms), teachers + 1
    return total / teachers


@pytest.mark.parametrize("prototypes", ["shared", "per_modality"])
def test_equals_its_definition_with_holes(prototypes: str) -> None:
    for seed in range(6):
        rows, present = unit_rows(ABC, 9, 6, seed), random_presence(ABC, 9, seed)
        loss = ClusterSwapLoss(modalities=ABC, embed_dim=6, num_prototypes=7, prototypes=prototypes).double()
        found = value(loss, rows, present)
        assert found == pytest.approx(literal(loss, rows, present), abs=1e-10)
    assert len(list(loss.bank.parameters())) == (1 if prototypes == "shared" else 3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(2, 4), st.integers(0, 99))
def test_order_of_samples_modalities_and_prototypes_does_not_matter(n: int, m: int, seed: int) -> None:
    names = [f"m{i}" for i in range(m)]
    rows, present = unit_rows(names, n, 6, seed), random_presence(names, n, seed)
    generator = torch.Generator().manual_seed(seed)
    order, prototypes = torch.randperm(n, generator=generator), torch.randperm(golden.K, generator=generator)
    moved = {name: rows[name][order] for name in reversed(names)}
    found = value(
        make(tuple(reversed(names)), golden.prototypes()[prototypes]), moved, {k: present[k][order] for k in names}
    )
    assert found == pytest.approx(value(make(tuple(names)), rows, present), abs=1e-11)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99))
def test_an_absent_row_takes_no_part(n: int, seed: int) -> None:
    """Neither in codes nor in predictions: the loss does not depend on what stands in its place."""
    rows, present = unit_rows(ABC, n, 6, seed), random_presence(ABC, n, seed)
    other = {name: torch.where(present[name][:, None], r, 7.0) for name, r in rows.items()}
    assert value(make(ABC), rows, present) == pytest.approx(value(make(ABC), other, present), abs=1e-12)


def test_no_gradient_flows_into_the_codes() -> None:
    """A modality that only assigns gets none."""
    rows = {name: tensor.requires_grad_() for name, tensor in unit_rows(("a", "b"), 6, 6).items()}
    loss = make(("a", "b"), pairs=[[0.0, 1.0], [0.0, 0.0]])
    loss(rows).loss.backward()
    assert rows["a"].grad is not None and not rows["a"].grad.any()
    assert rows["b"].grad is not None and rows["b"].grad.abs().sum() > 0.1


def test_gradcheck_of_the_predictions() -> None:
    rows = unit_rows(("a", "b"), 4, 6)
    loss = make(("a", "b"), pairs=[[0.0, 1.0], [0.0, 0.0]]).eval()
    assert torch.autograd.gradcheck(
        lambda b: loss({"a": rows["a"], "b": b}).loss, (rows["b"].clone().requires_grad_(),), atol=1e-8
    )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_half_precision_stays_finite_and_near(half: torch.dtype, epsilon: float) -> None:
    """In the linear domain exp(cosine / epsilon) overflows fp16 at the default epsilon from a cosine of .55 on."""
    rows = {name: tensor.to(half) for name, tensor in unit_rows(("a", "b"), 64, 6, 3).items()}
    exact = value(make(("a", "b"), epsilon=epsilon), {name: tensor.double() for name, tensor in rows.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value(make(("a", "b"), epsilon=epsilon).float(), rows)
    assert found == pytest.approx(exact, rel=1e-4)
    original = value(make(("a", "b"), epsilon=epsilon), unit_rows(("a", "b"), 64, 6, 3))
    assert found == pytest.approx(original, rel=1e-2)


def test_a_tiny_epsilon_stays_finite() -> None:
    close = F.normalize(golden.features(0)[:1] + 0.05 * golden.features(1), dim=1)
    for dtype in (torch.float32, torch.float64):
        loss = make(epsilon=0.005).to(dtype)
        output = loss({"image": torch.stack([close, close.roll(1, 0)], dim=1).to(dtype).requires_grad_()})
        output.loss.backward()
        assert math.isfinite(float(output.loss.detach()))
        assert all(bool(p.grad.isfinite().all()) for p in loss.parameters() if p.grad is not None)


def test_the_queue_waits_until_full_takes_the_newest_and_survives_a_checkpoint() -> None:
    loss = make(teacher_views=1, pairs="all", queue_length=12)
    plain = make(teacher_views=1)
    assert loss.queue is not None
    batches = [torch.stack([golden.features(s, shift=s), golden.features(s + 1, shift=s)], dim=1) for s in range(4)]
    assert value(loss, {"image": batches[0]}) == value(plain, {"image": batches[0]})  # empty
    assert value(loss, {"image": batches[1]}) == value(plain, {"image": batches[1]})  # 8 of 12: not full
    assert int(loss.queue.filled[0]) == 12
    assert torch.equal(loss.queue.rows[0], torch.cat([batches[1][:, 0], batches[0][:4, 0]]))
    again = make(teacher_views=1, pairs="all", queue_length=12)
    again.load_state_dict(loss.state_dict())
    used = value(loss, {"image": batches[2]})
    assert used != value(plain, {"image": batches[2]})
    assert used == value(again, {"image": batches[2]})
    assert torch.equal(loss.queue.rows, again.queue.rows)  # type: ignore[union-attr]  # made with a queue
    loss.eval()
    assert value(loss, {"image": batches[3]}) == pytest.approx(value(plain.eval(), {"image": batches[3]}), abs=1e-12)
    assert torch.equal(loss.queue.rows, again.queue.rows)  # type: ignore[union-attr]  # evaluation leaves it alone


def test_queue_start_waits_longer() -> None:
    loss, plain = make(teacher_views=2, queue_length=8, queue_start=3), make(teacher_views=2)
    for step in range(5):
        batch = {"image": torch.stack([golden.features(step), golden.features(step + 1)], dim=1)}
        assert (value(loss, batch) == value(plain, batch)) == (step < 3)


def test_absent_rows_do_not_enter_the_queue() -> None:
    loss = make(("a", "b"), teacher_views=1, queue_length=8)
    rows, present = unit_rows(("a", "b"), 8, 6), {"a": torch.arange(8) < 5, "b": torch.arange(8) >= 7}
    loss(rows, present)
    assert loss.queue is not None and loss.queue.filled.tolist() == [5, 1]
    assert torch.equal(loss.queue.rows[0, :5], rows["a"][:5]) and torch.equal(loss.queue.rows[1, 0], rows["b"][7])


def test_freezing_leaves_prototypes_bit_identical_under_momentum_and_decay() -> None:
    loss = ClusterSwapLoss(modalities=["image"], embed_dim=6, num_prototypes=12, freeze_steps=3)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.1, weight_decay=0.5)
    before = loss.bank.shared_0.detach().clone()
    for step in range(5):
        optimizer.zero_grad()
        loss({"image": views(step, step + 1).float()}).loss.backward()
        loss.before_optimizer_step()
        optimizer.step()
        assert torch.equal(loss.bank.shared_0.detach(), before) == (step < 3)


def test_prototypes_have_length_one_at_each_step_and_after_loading() -> None:
    loss = make()
    with torch.no_grad():
        loss.bank.shared_0.mul_(3.0)
    expected = value(make(), {"image": views(0, 1)})
    assert value(loss.eval(), {"image": views(0, 1)}) == pytest.approx(expected, abs=1e-12)
    assert float(loss.bank.shared_0.detach().norm(dim=1).max()) == pytest.approx(3)
    assert value(loss.train(), {"image": views(0, 1)}) == pytest.approx(expected, abs=1e-12)
    assert float(loss.bank.shared_0.detach().norm(dim=1).max()) == pytest.approx(1)


def test_several_sets_of_prototypes_are_averaged() -> None:
    loss = ClusterSwapLoss(modalities=["image"], embed_dim=6, num_prototypes=[5, 9]).double()
    singles = [make(weights=weights.detach()) for weights in loss.bank.parameters()]
    expected = sum(value(single, {"image": views(0, 1)}) for single in singles) / 2
    assert value(loss, {"image": views(0, 1)}) == pytest.approx(expected, abs=1e-12)


def test_joint_codes() -> None:
    """product: Sinkhorn of the summed scores; mean: of the scores of the normalised mean row."""
    rows = unit_rows(ABC, 8, 6)
    weights = golden.prototypes()
    summed = torch.stack(list(rows.values())).sum(dim=0)
    for codes, joint in (("product", summed), ("mean", F.normalize(summed, dim=1))):
        q = torch.exp(joint @ weights.T / 0.05)
        for _ in range(3):
            q = q / q.sum(dim=0)
            q = q / q.sum(dim=1, keepdim=True)
        terms = [-(q * torch.log_softmax(rows[b] @ weights.T / 0.1, dim=1)).sum(dim=1).mean() for b in ABC]
        expected = float(torch.stack(terms).mean())  # each b predicts the same codes, for each of the other two
        assert value(make(ABC, codes=codes), rows) == pytest.approx(expected, abs=1e-10)


def test_marginals_over_the_union_let_modalities_keep_apart() -> None:
    """Two modalities at opposite ends: with a share per view they must use the same prototypes, with the union not."""
    centre = golden.features(0)[:1]
    near = F.normalize(centre + 0.3 * golden.features(1), dim=1)
    far = F.normalize(-centre + 0.3 * golden.features(2), dim=1)
    usage = {}
    for groups in (None, [0, 0]):
        scores = torch.stack([near, far]) @ golden.prototypes().T
        codes = sinkhorn(scores, torch.ones(2, 8, dtype=torch.bool), epsilon=0.05, iterations=3, groups=groups)
        first, second = codes.mean(dim=1)
        usage[groups is None] = float(torch.minimum(first, second).sum())
    assert usage[True] > 0.6 > 0.25 > usage[False]
    rows = {"a": near, "b": far}
    by_view, by_union = (value(make(("a", "b"), marginals=marginals), rows) for marginals in ("view", "union"))
    by_modality = value(make(("a", "b"), marginals="modality"), rows)
    assert by_modality == pytest.approx(by_view, abs=1e-12) and by_union > by_view


def test_marginals_over_a_modality_join_its_views() -> None:
    rows = {"a": views(0, 1), "b": views(2, 3)}
    weights, terms = golden.prototypes(), []
    for name, other in (("a", "b"), ("b", "a")):
        q = torch.exp(torch.cat(rows[name].unbind(dim=1)) @ weights.T / 0.05)
        for _ in range(3):
            q = q / q.sum(dim=0)
            q = q / q.sum(dim=1, keepdim=True)
        for code, v in ((code, v) for code in q.split(golden.B) for v in range(2)):
            predicted = torch.log_softmax(rows[other][:, v] @ weights.T / 0.1, dim=1)
            terms.append(-(code * predicted).sum(dim=1).mean())
    found = value(make(("a", "b"), marginals="modality"), rows)
    assert found == pytest.approx(float(torch.stack(terms).mean()), abs=1e-12)
    assert found != pytest.approx(value(make(("a", "b")), rows), abs=1e-6)


def test_joint_codes_with_holes_are_of_the_modalities_that_are_there() -> None:
    rows, present = unit_rows(("a", "b"), 9, 6), random_presence(("a", "b"), 9, 3)
    some, both = present["a"] | present["b"], present["a"] & present["b"]
    assert int(both.sum()) >= 2 and int(some.sum()) < 9 and not torch.equal(some, both)
    weights = golden.prototypes()
    q = torch.exp((rows["a"] * present["a"][:, None] + rows["b"] * present["b"][:, None])[some] @ weights.T / 0.05)
    for _ in range(3):
        q = q / q.sum(dim=0)
        q = q / q.sum(dim=1, keepdim=True)
    codes = torch.zeros(9, golden.K, dtype=torch.float64)
    codes[some] = q
    terms = [-(codes * torch.log_softmax(rows[n] @ weights.T / 0.1, dim=1)).sum(dim=1)[both].mean() for n in ("a", "b")]
    output = make(("a", "b"), codes="product")(rows, present)
    assert float(output.loss.detach()) == pytest.approx(float(torch.stack(terms).mean()), abs=1e-12)
    assert "code_agreement" not in output.metrics  # joint codes agree by construction


def test_hard_codes_for_the_first_steps() -> None:
    loss = make(hard_steps=1)
    first = value(loss, {"image": views(0, 1)})
    scores = [golden.features(v) @ golden.prototypes().T for v in (0, 1)]
    valid = torch.ones(2, golden.B, dtype=torch.bool)
    best = sinkhorn(torch.stack(scores), valid, epsilon=0.05, iterations=3).argmax(dim=2)
    predicted = [torch.log_softmax(score / 0.1, dim=1) for score in scores]
    expected = sum(float(F.nll_loss(predicted[1 - v], best[v])) for v in (0, 1)) / 2
    assert first == pytest.approx(expected, abs=1e-12)
    assert value(loss, {"image": views(0, 1)}) == pytest.approx(golden.G3_TWO_VIEWS, abs=1e-12)


def test_nothing_in_common_is_a_zero_that_keeps_the_graph() -> None:
    rows = {name: tensor.requires_grad_() for name, tensor in unit_rows(("a", "b"), 4, 6).items()}
    loss = make(("a", "b"))
    output = loss(rows, {"a": torch.arange(4) < 2, "b": torch.arange(4) >= 2})
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in loss.parameters())
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in rows.values())


def test_figures_tell_a_collapse_from_health() -> None:
    torch.manual_seed(1)
    spread = make(("a", "b"))
    rows = unit_rows(("a",), 512, 6)["a"]
    for _ in range(400):
        healthy = spread({"a": rows, "b": rows}).metrics
    assert healthy["dead_prototypes"] < 0.2 < 0.8 < healthy["prototype_usage"]
    assert healthy["code_agreement"] == 1
    collapsed = make(("a", "b"))
    same = rows[:1].expand(512, -1)
    for _ in range(400):
        figures = collapsed({"a": same, "b": same}).metrics
    assert figures["dead_prototypes"] > 0.9 and figures["prototype_usage"] < 0.2
    assert figures["code_entropy"] == pytest.approx(1, abs=1e-6)  # Sinkhorn spreads what cannot be told apart
    unseen = make(("a", "b")).eval()({"a": same, "b": same}).metrics  # of this batch, whatever training saw
    assert unseen["dead_prototypes"] > 0.9 and unseen["prototype_usage"] < 0.01


@pytest.mark.parametrize("prototypes", ["shared", "per_modality"])
def test_score_is_the_swapped_prediction_on_the_prototypes_of_both(prototypes: str) -> None:
    rows = unit_rows(ABC, 5, 6)
    loss = ClusterSwapLoss(modalities=ABC, embed_dim=6, num_prototypes=[7, 4], prototypes=prototypes).double().eval()
    present = {"a": torch.tensor([True, False, True, True, True]), "b": torch.ones(5, dtype=torch.bool)}
    given = {"a": rows["a"], "b": rows["b"]}
    found = loss.score(target="c", candidates=rows["c"], given=given, present=present)
    for query, candidate in itertools.product(range(5), range(5)):
        expected = 0.0
        for name, head in itertools.product(("a", "b"), (0, 1)):
            if not present[name][query]:
                continue
            for owner, assigns, predicts in (
                (name, rows[name][query], rows["c"][candidate]),
                ("c", rows["c"][candidate], rows[name][query]),
            ):
                weights = loss.bank(owner, head).detach()
                code = torch.softmax(weights @ assigns / 0.1, dim=0)
                expected += float((code * torch.log_softmax(weights @ predicts / 0.1, dim=0)).sum()) / 2
        assert float(found[query, candidate]) == pytest.approx(expected, abs=1e-12)


def test_score_finds_what_shares_clusters() -> None:
    rows = golden.features(0)
    found = make(("a", "b")).eval().score(target="b", candidates=rows, given={"a": rows})
    assert found.argmax(dim=1).tolist() == list(range(golden.B))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"num_prototypes": 0}, "num_prototypes"),
        ({"pairs": "crossed"}, "did you mean 'cross'"),
        ({"pairs": "cross", "modalities": ["a"]}, "needs two modalities"),
        ({"pairs": [[1.0]]}, "must be 2 x 2"),
        ({"pairs": [[0.0, 0.0], [0.0, 0.0]]}, "not all 0"),
        ({"pairs": [[0.0, -1.0], [1.0, 0.0]]}, "from 0 up"),
        ({"codes": "mean", "prototypes": "per_modality"}, "needs prototypes='shared'"),
        ({"queue_length": 9}, "needs teacher_views"),
        ({"teacher_views": 0}, "teacher_views=0"),
        ({"freeze_steps": -1}, "must not be negative"),
        ({"marginals": "row"}, "marginals='row'"),
        ({"modalities": ["a", "a"]}, "named twice"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClusterSwapLoss(**{"modalities": ["a", "b"], "embed_dim": 6, **options})


def test_impossible_batches_are_refused() -> None:
    rows = unit_rows(("a", "b"), 8, 6)
    with pytest.raises(LossError, match=r"no view predicts another.*crops or views"):
        make(("a",))({"a": rows["a"]})
    assert not make(("a",)).eval()({"a": rows["a"]}).parts  # in evaluation a picture may come once
    with pytest.raises(LossError, match="queue of 7 features is shorter than the batch of 8"):
        make(("a", "b"), teacher_views=1, queue_length=7)(rows)
    with pytest.raises(LossError, match="knows no modality 'text'"):
        make(("a", "b"))({"a": rows["a"], "text": rows["b"]})
    rows["b"][3, 2] = math.nan
    with pytest.raises(LossError, match="NaN or infinity: 'b' in 1 samples"):
        make(("a", "b"))(rows)


def test_weights_between_modalities() -> None:
    rows = unit_rows(ABC, 6, 6)
    matrix = [[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]
    loss = make(ABC, pairs=matrix)
    parts = loss(rows).parts
    assert set(parts) == {"a->b", "a->c", "c->a"}
    expected = ((2 * parts["a->b"] + parts["a->c"]) / 3 + parts["c->a"]) / 2  # b assigns nothing
    assert value(loss, rows) == pytest.approx(float(expected), abs=1e-12)
    single = {
        pair: make(ABC, pairs=[[float((a, b) == pair) for b in ABC] for a in ABC])
        for pair in itertools.permutations(ABC, 2)
    }
    assert float(parts["a->c"]) == pytest.approx(value(single["a", "c"], rows), abs=1e-12)
