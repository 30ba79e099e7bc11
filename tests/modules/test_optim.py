"""The optimiser in one pass: the same steps as weight by weight, and gradients that Lightning may clip."""

from __future__ import annotations

import copy

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn

from mmrep.modules.optim import Schedule, make_optimizer, warmup_cosine


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def reference(model: nn.Module) -> torch.optim.AdamW:
    """PyTorch's loop over weights, with our groups: matrices decay, vectors do not."""
    weights = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.3},
            {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        foreach=False,
    )


def test_its_steps_are_those_of_the_loop_over_weights() -> None:
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    optimizer, other = make_optimizer("adamw", ours, [], lr=1e-2, weight_decay=0.3), reference(theirs)
    assert optimizer.defaults["fused"]
    for number in range(20):
        step(ours, optimizer, number)
        step(theirs, other, number)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


def test_it_goes_on_from_its_state_bit_by_bit_and_from_that_of_the_loop() -> None:
    trained = model()
    optimizer = make_optimizer("adamw", trained, [], lr=1e-2, weight_decay=0.3)
    for number in range(3):
        step(trained, optimizer, number)
    again = copy.deepcopy(trained)
    resumed = make_optimizer("adamw", again, [], lr=1e-2, weight_decay=0.3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(trained)
    loop = reference(before)
    earlier = copy.deepcopy(optimizer.state_dict())
    for group in earlier["param_groups"]:
        group |= {"fused": None, "foreach": False}  # as a checkpoint of before says
    loop.load_state_dict(earlier)
    for number in range(3, 6):
        step(trained, optimizer, number)
        step(again, resumed, number)
        step(before, loop, number)
    for one, two, three in zip(trained.parameters(), again.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, two) and torch.allclose(one, three, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_clips_its_gradients_under_mixed_precision(precision: str) -> None:
    """It refuses to where an optimiser says that it unscales gradients itself, as PyTorch's says when it is fused."""
    built = model()
    optimizer = make_optimizer("adamw", built, [], lr=1e-2, weight_decay=0.3)
    for weight in built.parameters():
        weight.grad = torch.full_like(weight, 3.0)
    MixedPrecision(precision, "cpu").clip_gradients(optimizer, 1.0)  # type: ignore[arg-type]
    clipped = torch.cat([weight.grad.flatten() for weight in built.parameters() if weight.grad is not None])
    assert clipped.norm() == pytest.approx(1.0, rel=1e-4)


def test_the_schedule_takes_up_a_group_that_is_added_on_the_way() -> None:
    """As a callback does that unfreezes; also after a resume, which restores the rates and no functions."""
    first, later = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
    schedule = Schedule(optimizer, warmup_cosine(4, 8))
    rates = []
    for number in range(4):
        if number == 2:
            optimizer.add_param_group({"params": list(later.parameters()), "lr": 0.1})
        optimizer.step()
        schedule.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[:2] == [[0.5], [0.75]] and rates[3] == pytest.approx([1.0, 0.1])

    again = torch.optim.SGD(first.parameters(), lr=1.0)
    resumed = Schedule(again, warmup_cosine(4, 8))
    again.add_param_group({"params": list(later.parameters()), "lr": 0.1})
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for one, other in ((optimizer, schedule), (again, resumed)):
        one.step()
        other.step()
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]
