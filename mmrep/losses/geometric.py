"""What GRAM and TRIANGLE share: a tuple is good when the body that its rows span is small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmrep.errors import ConfigError, LossError
from mmrep.losses.base import (
    Embeddings,
    LossOutput,
    Presence,
    RowLoss,
    check_modalities,
    check_name,
    check_score,
    fp32,
)
from mmrep.losses.info_nce import clamp_logit_scale, diagonal_cross_entropy, make_logit_scale
from mmrep.ops.gather import Gathered, Selection, world_size
from mmrep.ops.multilinear import in_fp32


class GeometricLoss(RowLoss):
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
        **settings: float | bool,
    ) -> None:
        check_modalities(modalities, at_least=2)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
        if anchor is not None:
            check_name(anchor, modalities, "anchor")
        super().__init__(
            anchor=anchor,
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            label_smoothing=label_smoothing,
            modalities=modalities,
            **settings,
        )
        self.anchor, self.max_logit_scale, self.label_smoothing = anchor, max_logit_scale, label_smoothing
        self.logit_scale = make_logit_scale(init_temperature, max_logit_scale, learn=learn_temperature)

    @property
    def scale(self) -> Tensor:
        """What sizes are multiplied by, with a minus sign."""
        return self.logit_scale.exp()

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
            clamp_logit_scale(self.logit_scale, self.max_logit_scale)
        if self.anchor is not None and self.anchor not in gathered.rows:
            raise LossError(f"the anchor '{self.anchor}' does not come, only {list(gathered.rows)}")
        tuples = gathered.select(gathered.rows)
        anchors = [self.anchor] if self.anchor else list(gathered.rows)
        terms = {anchor: self._anchor(anchor, tuples) for anchor in anchors}
        return LossOutput(
            torch.stack(list(terms.values())).mean(),
            {anchor: term.detach() for anchor, term in terms.items()},
            {"logit_scale": self.scale.detach()},
        )

    def _anchor(self, anchor: str, tuples: Selection) -> Tensor:
        if not tuples.total:
            return self.logit_scale.new_zeros(())
        rows, mine = tuples.rows[anchor], tuples.mine
        others = [tuples.rows[name] for name in tuples.rows if name != anchor]
        own_anchors = -self.scale * self.size(rows[mine], others)
        own_tuples = own_anchors.T  # where this rank has all rows
        if len(own_anchors) < tuples.total:
            own_tuples = -self.scale * self.size(rows, [other[mine] for other in others]).T
        term = diagonal_cross_entropy(own_anchors, own_tuples, mine, self.label_smoothing)
        return term * (world_size() / tuples.total)

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """Minus the scaled size of the body of the candidate and all that is given. See `Loss.score`."""
        check_score(target, given)
        queries = len(next(iter(given.values())))
        scores = in_fp32(candidates).new_zeros(queries, len(candidates))
        for names, asking in presence_patterns(given, present):
            tuples = [in_fp32(given[name])[asking] for name in names]
            if tuples:
                scores[asking] = -self.scale * self.size(in_fp32(candidates), tuples).T
        return scores


def presence_patterns(given: Embeddings, present: Presence | None) -> list[tuple[list[str], Tensor]]:
    """Which modalities the queries have: each pattern that occurs, with the numbers of its queries."""
    names = list(given)
    queries = len(given[names[0]])
    if present is None:
        return [(names, torch.arange(queries, device=given[names[0]].device))]
    has: Mapping[str, Tensor] = {name: present[name] for name in names}
    patterns, which = torch.stack(list(has.values()), dim=1).unique(dim=0, return_inverse=True)
    return [
        ([name for name, there in zip(names, pattern, strict=True) if there], (which == number).nonzero()[:, 0])
        for number, pattern in enumerate(patterns.tolist())
    ]
