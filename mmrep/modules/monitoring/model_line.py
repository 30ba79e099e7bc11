"""What is trained, on one line."""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl
from torch import nn

from mmrep.model import MultimodalModel


def model_line(module: pl.LightningModule) -> str:
    """How many parameters the encoders and the loss of a module have, and how many are trained."""
    model = module.model
    assert isinstance(model, MultimodalModel), "of a ContrastiveModule"
    parts = [
        f"{name} {type(encoder).__name__} {_count(encoder.parameters())}" for name, encoder in model.encoders.items()
    ]
    shared = [f"{name} shares that of {other}" for name, other in model.share.items()]
    loss = f"{type(model.loss).__name__} {_count(model.loss.parameters())}"
    trained = _count(weight for weight in model.parameters() if weight.requires_grad)
    return f"{_count(model.parameters())} parameters, {trained} trained: {', '.join([*parts, *shared, loss])}"


def _count(parameters: Iterable[nn.Parameter]) -> str:
    number = sum(parameter.numel() for parameter in parameters)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
