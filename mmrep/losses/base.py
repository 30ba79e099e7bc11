"""What every loss of mmrep is: a module over embeddings that also says how it ranks candidates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import LossError

Embeddings = Mapping[str, Tensor]
Presence = Mapping[str, Tensor]


@dataclass
class LossOutput:
    """What a loss gives.

    Attributes:
        loss: Scalar with graph. Over W ranks, the mean of the ranks' values is the loss of the whole batch, and the mean of
            their gradients (what DDP takes) its gradient.
        parts: Summands of the loss by name, detached, scaled as ``loss`` is.
        metrics: What is worth a curve, detached.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Loss(nn.Module):
    """Base of the losses.

    ``loss(embeddings, present)`` takes this rank's rows, ``{modality: [B, D]}`` and ``{modality: bool [B]}``, gathers what
    it needs, and gives a `LossOutput`. Temperature and whatever else it learns are its parameters.

    Args:
        **settings: The constructor's arguments, plain values: what a model folder stores to build the loss again.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, embeddings: Embeddings, present: Presence | None = None) -> LossOutput:
        raise NotImplementedError

    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """How well each candidate of modality ``target`` fits what is given: the loss's zero-shot rule.

        Args:
            target: Modality of the candidates.
            candidates: ``[C, D]``.
            given: One or more other modalities, ``{modality: [Q, D]}``.
            present: ``{modality: bool [Q]}``; an absent row says nothing. All are present where None.

        Returns:
            ``[Q, C]``, larger is better.

        Raises:
            LossError: If nothing is given, the target is given, or the loss cannot score the case.
        """
        raise NotImplementedError


def fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a loss's arithmetic outside autocast: logits rounded to bf16 cost a percent of gradient at scale 100."""

    @functools.wraps(function)
    def run(self: Loss, *args: Any, **kwargs: Any) -> Any:
        device = next((parameter.device.type for parameter in self.parameters()), "cpu")
        with torch.autocast(device, enabled=False):
            return function(self, *args, **kwargs)

    return run


def check_embeddings(embeddings: Embeddings, present: Presence | None, *, at_least: int) -> None:
    """Refuse what no loss can take.

    Raises:
        LossError: On too few modalities, unequal shapes, or presence that does not fit.
    """
    if len(embeddings) < at_least:
        raise LossError(f"the loss needs at least {at_least} modalities, it got {list(embeddings)}")
    shapes = {name: tuple(rows.shape) for name, rows in embeddings.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise LossError(
            f"embeddings must be [B, D] of one shape, they are {shapes}", fix="give all encoders one embed_dim"
        )
    rows = next(iter(shapes.values()))[0]
    for name in embeddings if present is not None else ():
        if present is not None and (name not in present or tuple(present[name].shape) != (rows,)):
            raise LossError(f"presence of '{name}' is missing or not of shape ({rows},)")


def check_score(target: str, given: Embeddings) -> None:
    """Refuse an impossible query.

    Raises:
        LossError: If nothing is given, or the target itself is.
    """
    if not given:
        raise LossError(f"nothing is given to find '{target}' by")
    if target in given:
        raise LossError(f"'{target}' is both given and asked for")


def connected_zero(embeddings: Embeddings, parameters: list[Tensor]) -> Tensor:
    """A zero that depends on every embedding and parameter, so that a step without a single pair still has gradients
    (of zero) on every rank: DDP waits for each of them."""
    return sum((tensor.sum() * 0.0 for tensor in [*embeddings.values(), *parameters]), torch.tensor(0.0))
