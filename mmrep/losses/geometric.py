"""What GRAM and TRIANGLE share: a tuple is good when the body that its rows span is small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses.base import LossOutput, RowLoss, ScaledLoss, fp32
from mmrep.losses.checks import Embeddings, Presence, check_modalities, check_name
from mmrep.losses.info_nce import diagonal_cross_entropy
from mmrep.losses.scores import presence_patterns
from mmrep.ops.gather import Gathered, Selection
from mmrep.ops.multilinear import in_fp32


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
        if self.anchor is not None and self.anchor not in gathered.rows:
            raise LossError(f"the anchor '{self.anchor}' does not come, only {list(gathered.rows)}")
        tuples, metrics = gathered.select(gathered.rows), {"logit_scale": self.scale.detach()}
        if not tuples.total:
            return LossOutput(self.logit_scale.new_zeros(()), {}, metrics)
        anchors = [self.anchor] if self.anchor else list(gathered.rows)
        terms = {anchor: tuples.mean(self._anchor(anchor, tuples)) for anchor in anchors}
        loss = torch.stack(list(terms.values())).mean()
        return LossOutput(loss, {anchor: term.detach() for anchor, term in terms.items()}, metrics)

    def _anchor(self, anchor: str, tuples: Selection) -> Tensor:
        """The anchor's loss, summed over this rank's rows."""
        rows, mine = tuples.rows[anchor], tuples.mine
        others = [tuples.rows[name] for name in tuples.rows if name != anchor]
        own_anchors = -self.scale * self.size(rows[mine], others)
        own_tuples = own_anchors.T  # where this rank has all rows
        if len(own_anchors) < tuples.total:
            own_tuples = -self.scale * self.size(rows, [other[mine] for other in others]).T
        return diagonal_cross_entropy(own_anchors, own_tuples, mine, self.label_smoothing)

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
