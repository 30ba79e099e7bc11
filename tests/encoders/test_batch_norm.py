"""GatheredBatchNorm against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrep.encoders import ConvImageEncoder
from mmrep.encoders.batch_norm import GatheredBatchNorm
from tests.gloo_pool import GlooPool


def test_equals_torch_batch_norm_in_value_and_gradient() -> None:
    ours, theirs = GatheredBatchNorm(5).double(), nn.BatchNorm1d(5, affine=False).double()
    one = (torch.randn(9, 5, dtype=torch.float64) * 3 + 2).requires_grad_()
    other = one.detach().clone().requires_grad_()
    weights = torch.randn(9, 5, dtype=torch.float64)
    (ours(one) * weights).sum().backward()
    (theirs(other) * weights).sum().backward()
    assert torch.allclose(ours(one), theirs(other), atol=1e-12)
    assert one.grad is not None and other.grad is not None and torch.allclose(one.grad, other.grad, atol=1e-12)
    for _ in range(300):  # torch's running variance is the unbiased one, 9/8 of ours
        ours(one)
        theirs(other)
    assert torch.allclose(ours.mean, theirs.running_mean, atol=1e-9)
    assert torch.allclose(ours.variance * 9 / 8, theirs.running_var, atol=1e-9)


def test_evaluation_does_not_mix_samples() -> None:
    encoder = ConvImageEncoder(4, image_size=16, width=8, batch_norm=True)
    pictures = (torch.rand(6, 3, 16, 16) * 255).to(torch.uint8)
    encoder(pictures)
    encoder.eval()
    assert torch.allclose(encoder(pictures)[:1], encoder(pictures[:1]), atol=1e-6)
    assert encoder.settings["batch_norm"] is True


def half_rows(rank: int, world: int, autocast: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a rank of a head in bf16, of features far from 0, gives, its gradient, and the running mean."""
    torch.manual_seed(0)
    features = (torch.randn(24, 6) + 10).bfloat16()
    own = features.chunk(world)[rank].clone().requires_grad_()
    norm = GatheredBatchNorm(6) if autocast else GatheredBatchNorm(6).bfloat16()
    rows = norm(own)
    (rows.float() * torch.arange(1, 7)).square().sum().backward()
    assert rows.dtype == torch.bfloat16 and norm.eval()(own).dtype == torch.bfloat16 and own.grad is not None
    return rows.detach(), own.grad, norm.mean


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_standardised_in_fp32_on_any_number_of_ranks(autocast: bool, pool2: GlooPool) -> None:
    rows, gradient, mean = half_rows(0, 1, autocast)
    assert rows.float().mean(dim=0).abs().max() < 2e-3, "bf16 statistics are wrong by 0.06"
    found = pool2.run(half_rows, [(rank, 2, autocast) for rank in range(2)])
    assert torch.equal(torch.cat([part for part, _, _ in found]), rows)
    assert torch.allclose(torch.cat([part for _, part, _ in found]).float(), gradient.float(), rtol=0.02, atol=0.02)
    assert all(torch.equal(theirs, mean) for _, _, theirs in found)
