"""What every loss of mmrep is: a module over embeddings that also says how it ranks candidates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import ConfigError, LossError, did_you_mean
from mmrep.ops.gather import Gathered, gather_embeddings
from mmrep.ops.multilinear import in_fp32

Embeddings = Mapping[str, Tensor]
Presence = Mapping[str, Tensor]


@dataclass
class LossOutput:
    """What a loss gives.

    Attributes:
        loss: Scalar with graph. Over W ranks, the mean of the ranks' values is the loss of the whole batch, and the mean of
            their gradients (what DDP takes) its gradient.
        parts: The terms of the loss by name, detached: each by itself, before weights and means, over ranks as ``loss`` is.
            None at all where the batch has no term.
        metrics: What is worth a curve, detached, equal on all ranks.
    """

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Loss(nn.Module):
    """Base of the losses.

    ``loss(embeddings, present)`` takes this rank's rows, ``{modality: [B, D]}`` or views ``{modality: [B, V, D]}``, and
    ``{modality: bool [B]}``, gathers what it needs, and gives a `LossOutput`. Temperature, prototypes and whatever else it
    learns are its parameters.

    Args:
        modalities: The names it will meet, where they are known: mistakes in its settings are then found at once.
        **settings: The constructor's other arguments, plain values: what a model folder stores to build the loss again.
    """

    def __init__(self, *, modalities: Sequence[str] | None, **settings: Any) -> None:
        super().__init__()
        self.modalities = None if modalities is None else list(modalities)
        self.settings = {**settings, "modalities": self.modalities}

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

    def not_decayed(self) -> list[Tensor]:
        """Weight matrices of its own that no weight decay may shrink; scalars and vectors are never decayed."""
        return []

    def before_optimizer_step(self) -> None:
        """Called after the backward pass and before the optimiser's step, on all ranks."""


def fp32(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a loss's arithmetic outside autocast: logits rounded to bf16 cost a percent of gradient at scale 100."""

    @functools.wraps(function)
    def run(self: Loss, *args: Any, **kwargs: Any) -> Any:
        device = next((tensor.device.type for tensor in _tensors([*args, *kwargs.values()])), "cpu")
        with torch.autocast(device, enabled=False):
            return function(self, *args, **kwargs)

    return run


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())


class RowLoss(Loss):
    """Base of the losses that compare one row of each modality: they write `objective`, over the rows of all ranks.

    Embeddings with views ``[B, V, D]`` are V batches, view v of each modality with view v of the others, and the loss is
    their mean; a modality with a single view lends it to all.
    """

    @fp32
    def forward(self, embeddings: Embeddings, present: Presence | None = None) -> LossOutput:
        """See `Loss`. Rows are used as they come: the model normalises them.

        Raises:
            LossError: On fewer than two modalities, unknown ones, shapes that do not fit, NaN, or infinity.
        """
        check_embeddings(embeddings, present, at_least=2, known=self.modalities)
        views = {rows.shape[1] for rows in embeddings.values() if rows.ndim == 3} - {1}
        if len(views) > 1:
            raise LossError(
                f"unequal numbers of views: { {name: rows.shape[1] for name, rows in embeddings.items() if rows.ndim == 3} }",
                fix="give all modalities the same number, or one",
            )
        gathered = gather_embeddings(*self.prepare({name: in_fp32(r) for name, r in embeddings.items()}, present))
        check_finite(gathered)
        outputs = [self.objective(gathered.view(number)) for number in range(max(views, default=1))]
        output = _mean(outputs)
        output.loss = output.loss + connected_zero([*gathered.rows.values(), *self.parameters()])
        return output

    def prepare(self, rows: dict[str, Tensor], present: Presence | None) -> tuple[dict[str, Tensor], Presence | None]:
        """What this rank does to its rows before they are gathered: nothing."""
        return rows, present

    def objective(self, gathered: Gathered) -> LossOutput:
        """The loss of rows ``[N, D]``: see `LossOutput` for how it is scaled over ranks."""
        raise NotImplementedError


def _mean(outputs: Sequence[LossOutput]) -> LossOutput:
    if len(outputs) == 1:
        return outputs[0]

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).mean(dim=0)

    return LossOutput(
        mean([output.loss for output in outputs]),
        {name: mean([output.parts[name] for output in outputs]) for name in outputs[0].parts},
        {name: mean([output.metrics[name] for output in outputs]) for name in outputs[0].metrics},
    )


def check_modalities(modalities: Sequence[str] | None, *, at_least: int) -> None:
    """Refuse at construction what no batch could mend.

    Raises:
        ConfigError: On too few modalities, or one that is named twice.
    """
    if modalities is None:
        return
    if len(modalities) < at_least:
        raise ConfigError(f"the loss needs at least {at_least} modalities, it has {list(modalities)}")
    if len(set(modalities)) < len(modalities):
        raise ConfigError(f"a modality is named twice in {list(modalities)}")


def check_name(name: str, modalities: Iterable[str] | None, what: str) -> None:
    """Refuse a setting that names an unknown modality.

    Raises:
        ConfigError: With the nearest known name.
    """
    if modalities is not None and name not in list(modalities):
        raise ConfigError(f"{what}: no modality '{name}'", fix=did_you_mean(name, modalities))


def check_embeddings(
    embeddings: Embeddings, present: Presence | None, *, at_least: int, known: Sequence[str] | None
) -> None:
    """Refuse what no loss can take, on shapes alone, which are equal on all ranks but for the number of rows.

    Raises:
        LossError: On too few modalities, unknown ones, unequal shapes, or presence that does not fit.
    """
    if len(embeddings) < at_least:
        raise LossError(f"the loss needs at least {at_least} modalities, it got {list(embeddings)}")
    for name in embeddings:
        if known is not None and name not in known:
            raise LossError(f"the loss knows no modality '{name}'", fix=did_you_mean(name, known))
    shapes = {name: tuple(rows.shape) for name, rows in embeddings.items()}
    fits = all(len(shape) in (2, 3) and 0 not in shape[1:] for shape in shapes.values())
    if not fits or len({(shape[0], shape[-1]) for shape in shapes.values()}) > 1:
        raise LossError(
            f"embeddings must be [B, D] or [B, V, D] of one B and D, they are {shapes}",
            fix="give all encoders one embed_dim",
        )
    rows = next(iter(shapes.values()))[0]
    for name in embeddings:
        if present is not None and (name not in present or tuple(present[name].shape) != (rows,)):
            raise LossError(f"presence of '{name}' is missing or not of shape ({rows},)")


def check_finite(gathered: Gathered) -> None:
    """Refuse NaN and infinity in the rows of any rank, on every rank, so that none waits for another.

    Raises:
        LossError: Naming the modalities.
    """
    bad = [(~rows.isfinite().flatten(1).all(dim=1)).sum() for rows in gathered.rows.values()]
    refuse_not_finite(dict(zip(gathered.rows, torch.stack(bad).tolist(), strict=True)))


def refuse_not_finite(bad: Mapping[str, int]) -> None:
    """Refuse a batch with so many bad rows per modality, if there are any.

    Raises:
        LossError: Naming the modalities.
    """
    if found := [f"'{name}' in {count} samples" for name, count in bad.items() if count]:
        raise LossError(
            f"embeddings hold NaN or infinity: {', '.join(found)}",
            fix="look for bad values in the data, or lower the learning rate",
        )


def check_score(target: str, given: Embeddings) -> None:
    """Refuse an impossible query.

    Raises:
        LossError: If nothing is given, or the target itself is.
    """
    if not given:
        raise LossError(f"nothing is given to find '{target}' by")
    if target in given:
        raise LossError(f"'{target}' is both given and asked for")


def connected_zero(tensors: Iterable[Tensor]) -> Tensor:
    """A zero that depends on every tensor, so that a step without a single pair still has gradients (of zero) on every
    rank: DDP waits for each of them. It reads no value: zero times infinity would be NaN."""
    return torch.stack([tensor.flatten()[:0].sum() for tensor in tensors]).sum()
