"""What every loss of mmrep is: a module over embeddings that also says how it ranks candidates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import ConfigError, LossError, did_you_mean
from mmrep.losses.checks import Embeddings, Presence, check_finite, check_shapes, check_views
from mmrep.ops.gather import Gathered, gather_embeddings


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
            An ``embed_dim`` among them is the width that embeddings must have.
    """

    def __init__(self, *, modalities: Sequence[str] | None, **settings: Any) -> None:
        super().__init__()
        self.modalities = None if modalities is None else list(modalities)
        self.settings = {**settings, "modalities": self.modalities}

    def check(self, embeddings: Embeddings, present: Presence | None, *, at_least: int) -> None:
        """Refuse what it cannot take, on names and shapes alone, which are equal on all ranks but for the number of rows.

        Raises:
            LossError: On too few modalities, other ones than declared, unequal shapes, or presence that does not fit.
        """
        if len(embeddings) < at_least:
            raise LossError(f"the loss needs at least {at_least} modalities, it got {list(embeddings)}")
        self._check_known(embeddings)
        for name in self.modalities or ():
            if name not in embeddings:
                raise LossError(f"the loss is over {self.modalities}, and '{name}' does not come")
        check_shapes(embeddings, present, self.settings.get("embed_dim"))

    def check_score(self, target: str, given: Embeddings, present: Presence | None) -> None:
        """Refuse an impossible query.

        Raises:
            LossError: If nothing is given, the target itself is, a name is unknown, or presence is missing.
        """
        if not given:
            raise LossError(f"nothing is given to find '{target}' by")
        if target in given:
            raise LossError(f"'{target}' is both given and asked for")
        self._check_known([target, *given])
        if lacking := [name for name in given if present is not None and name not in present]:
            raise LossError(f"presence of {lacking} is missing")

    def _check_known(self, names: Iterable[str]) -> None:
        for name in names:
            if self.modalities is not None and name not in self.modalities:
                raise LossError(f"the loss knows no modality '{name}'", fix=did_you_mean(name, self.modalities))

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


class ScaledLoss(Loss):
    """Base of the losses that multiply similarities by a learned or fixed scale, ``exp(logit_scale)``.

    Args:
        init_temperature: The scale starts at its inverse.
        learn_temperature: Whether it is learned.
        max_logit_scale: The scale is brought back to it before each step; None for no bound.
        scale_shape: Of the parameter: one scale, or one a pair.
        modalities, **settings: See `Loss`.

    Raises:
        ConfigError: If the temperature or the bound is not positive.
    """

    def __init__(
        self,
        *,
        init_temperature: float,
        learn_temperature: bool,
        max_logit_scale: float | None,
        modalities: Sequence[str] | None,
        scale_shape: tuple[int, ...] = (),
        **settings: Any,
    ) -> None:
        if not (init_temperature > 0 and (max_logit_scale is None or max_logit_scale > 0)):
            raise ConfigError(
                f"init_temperature={init_temperature} and max_logit_scale={max_logit_scale} must be positive"
            )
        super().__init__(
            modalities=modalities,
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            **settings,
        )
        self.max_logit_scale = max_logit_scale
        start = torch.full(scale_shape, -math.log(init_temperature))
        self.logit_scale = nn.Parameter(start, requires_grad=learn_temperature)
        self.bound_scale()

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by."""
        return self.logit_scale.exp()

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Bring the scale back to its bound, as CLIP does after each step (Radford et al. 2021, section 2.5).

        Not inside the graph: there a clamp would cut the gradient, and hold the scale at its bound for good.
        """
        if self.max_logit_scale is not None:
            self.logit_scale.clamp_(max=math.log(self.max_logit_scale))


class RowLoss(Loss):
    """Base of the losses that compare one row of each modality: they write `objective`, over the rows of all ranks.

    Embeddings with views ``[B, V, D]`` are V batches, view v of each modality with view v of the others, and the loss is
    their mean; a modality with a single view lends it to all.
    """

    @fp32
    def forward(self, embeddings: Embeddings, present: Presence | None = None) -> LossOutput:
        """See `Loss`. Rows are used as they come: the model normalises them.

        Raises:
            LossError: On fewer than two modalities, other ones than declared, shapes that do not fit, NaN, or infinity.
        """
        return self.over_views(embeddings, present, self.objective)

    def over_views(
        self, embeddings: Embeddings, present: Presence | None, objective: Callable[[Gathered], LossOutput]
    ) -> LossOutput:
        """The mean of an objective over the views of all ranks' rows."""
        self.check(embeddings, present, at_least=2)
        views = check_views(embeddings)
        rows, present = self.prepare(dict(embeddings), present)
        gathered = gather_embeddings(rows, present, self.travelling(list(rows)))
        check_finite(gathered, list(embeddings))
        output = _mean([objective(gathered.view(number)) for number in range(views)])
        output.loss = output.loss + connected_zero([*gathered.tensors(), *self.parameters()])
        return output

    def prepare(self, rows: dict[str, Tensor], present: Presence | None) -> tuple[dict[str, Tensor], Presence | None]:
        """What this rank does to its rows before they are gathered: nothing."""
        return rows, present

    def travelling(self, names: Sequence[str]) -> Sequence[str]:
        """The modalities whose rows every rank needs: what the objective finds in ``gathered.rows``. Others stay at home."""
        return names

    def objective(self, gathered: Gathered) -> LossOutput:
        """The loss of rows ``[n, D]`` of this rank and ``[N, D]`` of all: see `LossOutput` for how it is scaled over ranks."""
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


def weighted_sum(terms: Mapping[Any, Tensor], weights: Mapping[Any, float], like: Tensor) -> Tensor:
    """``sum w L`` over the terms that a batch has; a zero on the device of ``like`` where it has none."""
    return torch.stack([like.new_zeros(()), *(weights[name] * term for name, term in terms.items())]).sum()


def connected_zero(tensors: Iterable[Tensor]) -> Tensor:
    """A zero that depends on every tensor, so that a step without a single pair still has gradients (of zero) on every
    rank: DDP waits for each of them. It reads no value: zero times infinity would be NaN."""
    return torch.stack([tensor.flatten()[:0].sum() for tensor in tensors]).sum()
