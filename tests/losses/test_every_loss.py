"""What holds for every loss with every option."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from mmrep.errors import LossError
from mmrep.losses import Loss
from tests.losses.cases import LOSSES, NAMES, VIEWS, WITH_VIEWS, random_presence, unit_rows

DIM = 6


def make(name: str) -> Loss:
    torch.manual_seed(2)
    loss: Loss = LOSSES[name]()
    return loss


def batch(name: str, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Unit rows, or views where the loss wants them, of the modalities that it knows."""
    names = make(name).modalities or list(NAMES)
    views = VIEWS if name.startswith(WITH_VIEWS) else 1
    rows = {key: r.view(n, views, DIM) for key, r in unit_rows(names, n * views, DIM, seed).items()}
    return rows if views > 1 else {key: r[:, 0] for key, r in rows.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_samples_and_modalities_does_not_matter(name: str) -> None:
    """But for Symile's shuffled negatives, whose columns are other tuples when the samples come in another order."""
    for seed in range(3):
        rows = batch(name, 7, seed)
        present = random_presence(list(rows), 7, seed)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        if name.startswith("symile") and "all" not in name:
            order = torch.arange(7)
        moved = {key: rows[key][order] for key in reversed(rows)}
        expected = make(name).double()(rows, present).loss.detach()
        found = make(name).double()(moved, {key: present[key][order] for key in rows}).loss.detach()
        assert float(found) == pytest.approx(float(expected), abs=1e-10)


# At the scale of 200 of the unbounded one, rounding the rows to half precision moves the loss itself by more than 1e-2.
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "clip-unbounded"])
def test_half_precision_stays_finite_and_near_float64(name: str, half: torch.dtype) -> None:
    rows = batch(name, 8 if "queue" in name else 32, 1)
    expected = float(make(name).double()(rows).loss.detach())
    leaves = {key: r.to(half).requires_grad_() for key, r in rows.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make(name)(leaves).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-2)
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves.values())


@pytest.mark.parametrize("name", LOSSES)
def test_settings_and_state_bring_it_back(name: str) -> None:
    """A resumed run goes on as one that was not interrupted: shifts, queues, frozen steps, scales."""
    loss = make(name)
    for seed in range(2):
        loss({key: r.float() for key, r in batch(name, 8, seed).items()})
    again = type(loss)(**json.loads(json.dumps(loss.settings)))
    again.load_state_dict(loss.state_dict())
    rows = {key: r.float() for key, r in batch(name, 8, 5).items()}
    assert torch.equal(loss(rows).loss, again(rows).loss)
    for (key, one), other in zip(loss.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_at_all_is_a_zero_with_gradients_of_zero(name: str) -> None:
    loss, rows = make(name), {key: r.float().requires_grad_() for key, r in batch(name, 4).items()}
    output = loss(rows, {key: torch.zeros(4, dtype=torch.bool) for key in rows})
    output.loss.backward()
    assert float(output.loss.detach()) == 0
    leaves = [*rows.values(), *(p for p in loss.parameters() if p.requires_grad)]
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_it_does_not_matter_what_stands_in_the_place_of_an_absent_row(name: str) -> None:
    for seed in range(3):
        rows = batch(name, 7, seed)
        present = random_presence(list(rows), 7, seed)
        found = []
        for fill in (None, 0.0, 7.0, 1e30):
            filled = {
                key: r if fill is None else torch.where(present[key].view(-1, *[1] * (r.ndim - 1)), r, fill)
                for key, r in rows.items()
            }
            found.append(float(make(name).double()(filled, present).loss.detach()))
        assert found == pytest.approx([found[0]] * 4, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_other_modalities_and_widths_than_declared_are_refused(name: str) -> None:
    loss, rows = make(name), batch(name, 4)
    if loss.modalities is None:
        return
    wide = {key: torch.cat([r, r], dim=-1) for key, r in rows.items()}
    if "embed_dim" in loss.settings:
        with pytest.raises(LossError, match="'a' are 12 wide, the loss was made for 6"):
            loss(wide)
    with pytest.raises(LossError, match="knows no modality 'z'"):
        loss({**rows, "z": rows["a"]})
    if len(rows) > 2:
        with pytest.raises(LossError, match="'c' does not come"):
            loss({key: rows[key] for key in ("a", "b")})
        single = {key: r if r.ndim == 2 else r[:, 0] for key, r in rows.items()}
        for wrong in ({"target": "z", "given": single}, {"target": "a", "given": {"z": single["b"]}}):
            with pytest.raises(LossError, match="knows no modality 'z'"):
                loss.score(candidates=single["a"], **wrong)  # type: ignore[arg-type]  # as a user might


@pytest.mark.parametrize("name", LOSSES)
def test_score_refuses_the_impossible_and_says_nothing_where_nothing_is_known(name: str) -> None:
    loss, rows = make(name), {key: r if r.ndim == 2 else r[:, 0] for key, r in batch(name, 4).items()}
    if len(rows) < 3:
        return
    given = {"a": rows["a"], "b": rows["b"]}
    with pytest.raises(LossError, match="nothing is given"):
        loss.score(target="c", candidates=rows["c"], given={})
    with pytest.raises(LossError, match="both given and asked for"):
        loss.score(target="a", candidates=rows["a"], given=given)
    with pytest.raises(LossError, match=r"presence of \['b'\] is missing"):
        loss.score(target="c", candidates=rows["c"], given=given, present={"a": torch.ones(4, dtype=torch.bool)})
    if name.startswith("symile-placeholder"):
        return  # there the placeholders speak
    absent = {key: torch.tensor([True, True, False, True]) for key in given}
    scores = loss.double().score(target="c", candidates=rows["c"], given=given, present=absent)
    assert not scores[2].any() and bool(scores[0].any())


@pytest.mark.parametrize("name", LOSSES)
def test_a_model_in_bfloat16_still_computes_in_fp32(name: str) -> None:
    """Trainer(precision="bf16-true") casts the loss's own parameters."""
    rows = batch(name, 8, 1)
    expected = float(make(name).double()(rows).loss.detach())
    found = make(name).to(torch.bfloat16)({key: r.to(torch.bfloat16) for key, r in rows.items()}).loss
    assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_and_metrics_are_detached_and_finite(name: str) -> None:
    output = make(name)({key: r.float() for key, r in batch(name, 8).items()})
    figures = {**output.parts, **output.metrics}
    assert output.parts and all(not value.requires_grad and math.isfinite(float(value)) for value in figures.values())
