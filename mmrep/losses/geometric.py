"""What GRAM and TRIANGLE share: a tuple is good when the body that its rows span is small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses.base import LossOutput, RowLoss, ScaledLoss, fp32
from mmrep.losses.checks import Embeddings, Presence, check_modalities, check_name
from mmrep.losses.scores import presence_patterns
from mmrep.ops.gather import Gathered, Selection, logsumexp_over_ranks
from mmrep.ops.multilinear import in_fp32
from mmrep.ops.paths import choose_path
from mmrep.ops.product_logsumexp import safe_logsumexp

STRIP = 512
"""Anchors whose sizes with all tuples are in memory at one time, where there are many."""

LIVE_COPIES = 8
"""What a backward pass through sizes keeps, in matrices of logits."""


class GeometricLoss(ScaledLoss, RowLoss):
    """Contrasts each anchor row with the tuples of the others' rows, by the size of the body they span.

    With K complete samples and the anchor a, ``L_a = 1/2K sum_i [ CE_i(-s size(a_i, others_j))_j + CE_i(-s size(a_j,
    others_i))_j ]``, CE with label smoothing. The others of a tuple stay together: K^2 bodies, never K^M.

    Args:
        anchor: Whose rows are contrasted (the papers take text); None takes each modality in turn, and the mean.
        init_temperature: The logit scale s starts at its inverse.
        learn_temperature: Whether the logit scale is learned.
        max_logit_scale: The logit scale is brought back to it before each step; None for no bound.
        label_smoothing: Share of the target that goes to all columns alike.
        modalities: See `Loss`.
        **settings: The subclass's own.
    """

    def __init__(
        self,
        *,
        anchor: str | None,
        init_temperature: float,
        learn_temperature: bool,
        max_logit_scale: float | None,
        label_smoothing: float,
        modalities: Sequence[str] | None,
        **settings: Any,
    ) -> None:
        check_modalities(modalities, at_least=2)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
        if anchor is not None:
            check_name(anchor, modalities, "anchor")
        super().__init__(
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            modalities=modalities,
            anchor=anchor,
            label_smoothing=label_smoothing,
            **settings,
        )
        self.anchor, self.label_smoothing = anchor, label_smoothing

    def size(self, anchor: Tensor, others: Sequence[Tensor]) -> Tensor:
        """Size of the body of each anchor row with each tuple.

        Args:
            anchor: ``[A, D]``.
            others: M - 1 tensors ``[C, D]``.

        Returns:
            ``[A, C]``, with a finite gradient everywhere.
        """
        raise NotImplementedError

    def objective(self, gathered: Gathered) -> LossOutput:
        """See `RowLoss`.

        Raises:
            LossError: If the anchor does not come.
        """
        if self.training:
            self.bound_scale()
        if self.anchor is not None and self.anchor not in gathered.own:
            raise LossError(f"the anchor '{self.anchor}' does not come, only {list(gathered.own)}")
        tuples, metrics = gathered.select(gathered.own), {"logit_scale": self.scale.detach()}
        if not tuples.total:
            return LossOutput(self.logit_scale.new_zeros(()), {}, metrics)
        anchors = [self.anchor] if self.anchor else list(gathered.own)
        directions = [self._directions(anchor, tuples, len(anchors)) for anchor in anchors]
        columns = logsumexp_over_ranks([columns for columns, _ in directions])
        terms = {}
        for anchor, whole, (_, others) in zip(anchors, columns, directions, strict=True):
            terms[anchor] = tuples.mean(whole[tuples.mine].sum() / 2 + others)
        loss = torch.stack(list(terms.values())).mean()
        return LossOutput(loss, {anchor: term.detach() for anchor, term in terms.items()}, metrics)

    def travelling(self, names: Sequence[str]) -> Sequence[str]:
        """A fixed anchor stays at home, its tuples travel. See `RowLoss`."""
        return [name for name in names if name != self.anchor]

    def _directions(self, anchor: str, tuples: Selection, anchors: int) -> tuple[Tensor, Tensor]:
        """Log-sum-exps of the columns over this rank's anchors ``[K]``, and the sum of all the rest of their loss.

        Strips of anchors against all tuples; many of them are computed again in the backward pass instead of being kept.
        """
        own, total = tuples.own[anchor], tuples.total
        others = [tuples.rows[name] for name in tuples.rows if name != anchor]
        path = choose_path(len(own), total, own.dtype, terms=anchors * tuples.share * LIVE_COPIES)
        if path.name != "tiled":
            return self._strip(own, tuples.mine.start, *others)
        columns, rest = [], []
        for first in range(0, max(1, len(own)), STRIP):
            strip = (own[first : first + STRIP], tuples.mine.start + first, *others)
            found = torch.utils.checkpoint.checkpoint(self._strip, *strip, use_reentrant=False)
            columns.append(found[0])
            rest.append(found[1])
        return safe_logsumexp(torch.stack(columns), 0), torch.stack(rest).sum()

    def _strip(self, anchors: Tensor, offset: int, *others: Tensor) -> tuple[Tensor, Tensor]:
        logits = -self.scale * self.size(anchors, others)
        positives = logits.diagonal(offset)
        smooth = self.label_smoothing * logits.sum() / logits.shape[1] if self.label_smoothing else 0.0
        rest = logits.logsumexp(dim=1).sum() / 2 - (1 - self.label_smoothing) * positives.sum() - smooth
        return safe_logsumexp(logits, 0), rest

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """Minus the scaled size of the body of the candidate and all that is given. See `Loss.score`."""
        self.check_score(target, given, present)
        queries = len(next(iter(given.values())))
        scores = in_fp32(candidates).new_zeros(queries, len(candidates))
        for names, asking in presence_patterns(given, present):
            tuples = [in_fp32(given[name])[asking] for name in names]
            if tuples:
                scores[asking] = -self.scale * self.size(in_fp32(candidates), tuples).T
        return scores
