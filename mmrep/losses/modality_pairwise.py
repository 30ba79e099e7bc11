"""Modality-pairwise contrast over views: every ordered pair of modalities, positives across views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrep.errors import ConfigError, LossError, did_you_mean
from mmrep.losses.base import (
    Embeddings,
    Loss,
    LossOutput,
    Presence,
    check_embeddings,
    check_finite,
    check_modalities,
    check_score,
    connected_zero,
    fp32,
)
from mmrep.losses.info_nce import clamp_logit_scale, make_logit_scale
from mmrep.losses.weights import Matrix, check_matrix, weight_between
from mmrep.ops.gather import Gathered, gather_embeddings, world_size
from mmrep.ops.multilinear import in_fp32

POSITIVES = ("aligned", "other_view", "all")


class ModalityPairwiseLoss(Loss):
    r"""InfoNCE of every ordered pair of modalities over V temporal or augmented views (Franceschini et al., ICPR 2022).

    Anchor: view v of sample i in modality a. Columns: all views of all samples in modality b. With the positives P(v),
    ``L_ab = 1/(K V) sum_iv [ lse_jw s a_iv.b_jw - 1/|P(v)| sum_{w in P(v)} s a_iv.b_iw ]``, over the K samples that have both,
    and the loss is the mean of L_ab over the ordered pairs. ``V = 1``, ``aligned`` and two modalities are CLIP.

    The paper's code is ``positives="other_view", exclude_aligned=True, legacy_scale=0.5`` with a fixed temperature: it leaves
    the row of the same window out, as if it were the anchor itself, and divides by the number of positives plus one.

    Args:
        positives: ``aligned``: the same view (of two windows, the same time). ``other_view``: the other views. ``all``: both,
            their mean.
        exclude_aligned: Whether the same view is left out of the columns; with ``other_view`` only.
        legacy_scale: What the loss is multiplied by.
        init_temperature, learn_temperature, max_logit_scale: Of the logit scale; as published it is fixed at 1 / .07.
        weights: M x M, of L_ab in row a and column b; needs ``modalities``. By default all are 1.
        modalities: See `Loss`.
    """

    def __init__(
        self,
        *,
        positives: str = "other_view",
        exclude_aligned: bool = False,
        legacy_scale: float = 1.0,
        init_temperature: float = 0.07,
        learn_temperature: bool = False,
        max_logit_scale: float | None = 100.0,
        weights: Matrix | None = None,
        modalities: Sequence[str] | None = None,
    ) -> None:
        if positives not in POSITIVES:
            raise ConfigError(f"positives={positives!r}", fix=did_you_mean(positives, POSITIVES))
        if exclude_aligned and positives != "other_view":
            raise ConfigError("exclude_aligned leaves out a positive", fix="use it with positives='other_view'")
        if not legacy_scale > 0:
            raise ConfigError(f"legacy_scale={legacy_scale} must be positive")
        check_modalities(modalities, at_least=2)
        if weights is not None:
            check_matrix(weights, modalities, "weights")
        super().__init__(
            positives=positives,
            exclude_aligned=exclude_aligned,
            legacy_scale=legacy_scale,
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            weights=weights,
            modalities=modalities,
        )
        self.positives, self.exclude_aligned, self.legacy_scale = positives, exclude_aligned, legacy_scale
        self.weights, self.max_logit_scale = weights, max_logit_scale
        self.logit_scale = make_logit_scale(init_temperature, max_logit_scale, learn=learn_temperature)

    @property
    def scale(self) -> Tensor:
        """What inner products are multiplied by."""
        return self.logit_scale.exp()

    @fp32
    def forward(self, embeddings: Embeddings, present: Presence | None = None) -> LossOutput:
        """See `Loss`. A modality with a single view lends it to all; with one view each, in evaluation, ``other_view`` is
        ``aligned``.

        Raises:
            LossError: On fewer than two modalities or unknown ones, shapes that do not fit, NaN, infinity, or one view in
                training where other views are the positives.
        """
        check_embeddings(embeddings, present, at_least=2, known=self.modalities)
        if self.training:
            clamp_logit_scale(self.logit_scale, self.max_logit_scale)
        gathered = gather_embeddings({name: in_fp32(rows) for name, rows in embeddings.items()}, present)
        check_finite(gathered)
        views = self._views(gathered)
        weights = {
            (a, b): 1.0 if self.weights is None else weight_between(self.weights, self.modalities or [], a, b)
            for a in embeddings
            for b in embeddings
            if a != b
        }
        terms = {pair: self._ordered_pair(gathered, *pair, views) for pair, weight in weights.items() if weight}
        loss = connected_zero([*gathered.rows.values(), *self.parameters()])
        for pair, term in terms.items():
            loss = loss + weights[pair] / sum(weights.values()) * term
        parts = {f"{a}-{b}": term.detach() for (a, b), term in terms.items()}
        return LossOutput(loss, parts, {"logit_scale": self.scale.detach()})

    def _views(self, gathered: Gathered) -> int:
        counts = {name: rows.shape[1] if rows.ndim == 3 else 1 for name, rows in gathered.rows.items()}
        views = max(counts.values())
        if set(counts.values()) - {1, views}:
            raise LossError(f"unequal numbers of views: {counts}", fix="give all modalities the same number, or one")
        if views == 1 and self.positives == "other_view" and self.training:
            raise LossError(
                "the positives are other views, and each modality has one",
                fix="give encoders `views: 2`, or the loss positives: aligned",
            )
        return views

    def _ordered_pair(self, gathered: Gathered, a: str, b: str, views: int) -> Tensor:
        """L_ab on this rank's rows."""
        both = gathered.select((a, b))
        if not both.total:
            return self.logit_scale.new_zeros(())
        anchors, columns = (_with_views(both.rows[name], views) for name in (a, b))
        logits = self.scale * torch.einsum("ivd,jwd->ivjw", anchors[both.mine], columns)
        same = torch.eye(views, dtype=torch.bool, device=logits.device)
        own = torch.arange(both.mine.start, both.mine.stop, device=logits.device)
        of_sample = logits[torch.arange(len(own), device=logits.device), :, own]  # [k, V, V]
        positives = self._positives(same)
        wanted = (of_sample * positives).sum(dim=2) / positives.sum(dim=1)
        if self.exclude_aligned and views > 1:
            aligned = torch.zeros_like(logits, dtype=torch.bool)
            aligned[torch.arange(len(own), device=logits.device), :, own] = same
            logits = logits.masked_fill(aligned, -torch.inf)
        entropy = (logits.flatten(2).logsumexp(dim=2) - wanted).sum()
        return self.legacy_scale * entropy * (world_size() / (both.total * views))

    def _positives(self, same: Tensor) -> Tensor:
        """bool ``[V, V]``: which columns' views are right for an anchor's view."""
        if self.positives == "aligned" or len(same) == 1:
            return same
        return ~same if self.positives == "other_view" else torch.ones_like(same)

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The scaled sum over the given modalities of their inner products with the candidate. See `Loss.score`."""
        check_score(target, given)
        known = {name: in_fp32(rows) for name, rows in given.items()}
        if present is not None:
            known = {name: rows * present[name][:, None] for name, rows in known.items()}
        scores: Tensor = self.scale * torch.stack(list(known.values())).sum(dim=0) @ in_fp32(candidates).T
        return scores


def _with_views(rows: Tensor, views: int) -> Tensor:
    """``[K, D]`` or ``[K, 1 or V, D]`` to ``[K, V, D]``."""
    return (rows if rows.ndim == 3 else rows[:, None]).expand(-1, views, -1)
