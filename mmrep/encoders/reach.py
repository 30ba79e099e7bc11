"""What of a network its own forward pass reaches: parameters that it does not would stop DDP, which waits for each."""

from __future__ import annotations

import torch
from torch import nn

from mmrep.encoders.base import Encoder
from mmrep.errors import ConfigError


def unreached_parameters(encoder: Encoder) -> list[str]:
    """Names of the trained parameters that get no gradient from the encoder's features.

    One backward pass of two empty inputs, in evaluation mode; gradients are left as they were.

    Raises:
        ConfigError: If the network cannot take an input of its own settings: a text that is too long for it, say.
    """
    trained = {name: weight for name, weight in encoder.named_parameters() if weight.requires_grad}
    trained = {name: weight for name, weight in trained.items() if not name.startswith("head.")}
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.enable_grad():
            features = encoder.features(encoder.empty(2))
    except (RuntimeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{type(encoder).__name__}: the network cannot take its own input ({reason[:120]})",
            fix="choose a smaller length, or other settings",
        ) from error
    finally:
        encoder.train(was_training)
    gradients = torch.autograd.grad(features.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def freeze_unreached(encoder: Encoder) -> None:
    """Stop training what the features do not depend on: embeddings and poolers that our pooling never asks for."""
    parameters: dict[str, nn.Parameter] = dict(encoder.named_parameters())
    for name in unreached_parameters(encoder):
        parameters[name].requires_grad_(False)
