"""GatheredBatchNorm against torch's own."""

from __future__ import annotations

import torch
from torch import nn

from mmrep.encoders import ConvImageEncoder
from mmrep.encoders.batch_norm import GatheredBatchNorm


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
