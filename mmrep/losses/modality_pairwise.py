"""Modality-pairwise contrast over views: every ordered pair of modalities, positives across views."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmrep.errors import ConfigError, LossError, check_choice
from mmrep.losses.base import LossOutput, ScaledLoss, connected_zero, fp32, weighted_sum
from mmrep.losses.checks import Embeddings, Presence, check_finite, check_modalities, check_views
from mmrep.losses.info_nce import Pair, orient
from mmrep.losses.pairs import cover
from mmrep.losses.scores import inner_products
from mmrep.losses.weights import Matrix, check_matrix, weight_between
from mmrep.ops.gather import Selection, gather_embeddings, logsumexp_over_ranks
from mmrep.ops.product_logsumexp import product_logsumexp

POSITIVES = ("aligned", "other_view", "all")


class ModalityPairwiseLoss(ScaledLoss):
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
        check_choice("positives", positives, POSITIVES)
        if exclude_aligned and positives != "other_view":
            raise ConfigError("exclude_aligned leaves out a positive", fix="use it with positives='other_view'")
        if not legacy_scale > 0:
            raise ConfigError(f"legacy_scale={legacy_scale} must be positive")
        check_modalities(modalities, at_least=2)
        if weights is not None:
            check_matrix(weights, modalities, "weights", diagonal=False)
        super().__init__(
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            modalities=modalities,
            positives=positives,
            exclude_aligned=exclude_aligned,
            legacy_scale=legacy_scale,
            weights=weights,
        )
        self.positives, self.exclude_aligned, self.legacy_scale = positives, exclude_aligned, legacy_scale
        self.weights = weights

    @fp32
    def forward(self, embeddings: Embeddings, present: Presence | None = None) -> LossOutput:
        """See `Loss`. A modality with a single view lends it to all; with one view each, in evaluation, ``other_view`` is
        ``aligned``.

        Raises:
            LossError: On fewer than two modalities or unknown ones, shapes that do not fit, NaN, infinity, or one view in
                training where other views are the positives.
        """
        self.check(embeddings, present, at_least=2)
        views = check_views(embeddings)
        if views == 1 and self.positives == "other_view" and self.training:
            raise LossError(
                "the positives are other views, and each modality has one",
                fix="give encoders `views: 2`, or the loss positives: aligned",
            )
        if self.training:
            self.bound_scale()
        weights = {pair: self._weight(*pair) for pair in itertools.permutations(embeddings, 2)}
        pairs = [pair for pair in itertools.combinations(embeddings, 2) if weights[pair] or weights[pair[::-1]]]
        gathered = gather_embeddings(embeddings, present, cover(pairs))
        check_finite(gathered, list(embeddings))
        selections = {pair: both for pair in pairs if (both := gathered.select(pair)).total}
        terms = {pair: term for pair, term in self._terms(selections, views).items() if weights[pair]}
        loss = connected_zero([*gathered.tensors(), *self.parameters()])
        loss = loss + weighted_sum(terms, weights, loss) / sum(weights.values())
        parts = {f"{a}-{b}": term.detach() for (a, b), term in terms.items()}
        return LossOutput(loss, parts, {"logit_scale": self.scale.detach()})

    def _weight(self, a: str, b: str) -> float:
        return 1.0 if self.weights is None else weight_between(self.weights, self.modalities or [], a, b)

    def _terms(self, selections: Mapping[Pair, Selection], views: int) -> dict[Pair, Tensor]:
        """L_ab and L_ba of each pair, this rank's share: the rows and the columns of one matrix of logits."""
        directions = {}
        for pair, both in selections.items():
            one, other = orient(pair, both)
            anchors, columns = _with_views(both.own[one], views), _with_views(both.rows[other], views)
            directions[one, other] = product_logsumexp(
                anchors.flatten(0, 1),
                columns.flatten(0, 1),
                self.scale,
                offset=both.mine.start * views,
                without_positives=self.exclude_aligned and views > 1,
                terms=len(selections),
            )
        wholes = logsumexp_over_ranks([sums for _, sums, _ in directions.values()])
        terms = {}
        for both, whole, ((a, b), (rows, _, aligned)) in zip(
            selections.values(), wholes, directions.items(), strict=True
        ):
            mine = slice(both.mine.start * views, both.mine.stop * views)
            wanted = self._wanted(both.own[a], both.own[b], aligned.view(-1, views))
            for pair, sums in (((a, b), rows), ((b, a), whole[mine])):
                terms[pair] = both.mean(self.legacy_scale * (sums.view(-1, views) - wanted).sum()) / views
        return terms

    def _wanted(self, a: Tensor, b: Tensor, aligned: Tensor) -> Tensor:
        """Each row's mean logit over its positives ``[k, V]``; for both directions alike, as their sum over a sample's views
        is the same."""
        views = aligned.shape[1]
        if self.positives == "aligned" or views == 1:
            return aligned
        logits = self.scale * torch.einsum("ivd,iwd->ivw", _with_views(a, views), _with_views(b, views))
        right = self._positives(torch.eye(views, dtype=torch.bool, device=logits.device))
        return (logits * right).sum(dim=2) / right.sum(dim=1)

    def _positives(self, same: Tensor) -> Tensor:
        """bool ``[V, V]``: which columns' views are right for an anchor's view."""
        return ~same if self.positives == "other_view" else torch.ones_like(same)

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The scaled sum over the given modalities of their inner products with the candidate. See `Loss.score`."""
        self.check_score(target, given, present)
        return inner_products(candidates, given, present, dict.fromkeys(given, self.scale))


def _with_views(rows: Tensor, views: int) -> Tensor:
    """``[K, D]`` or ``[K, 1 or V, D]`` to ``[K, V, D]``."""
    return (rows if rows.ndim == 3 else rows[:, None]).expand(-1, views, -1)
