"""Pairwise CLIP: InfoNCE, or its sigmoid form, between pairs of M modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mmrep.errors import ConfigError, check_choice
from mmrep.losses.base import LossOutput, RowLoss, ScaledLoss, fp32, weighted_sum
from mmrep.losses.checks import Embeddings, Presence, check_modalities
from mmrep.losses.info_nce import info_nce, sigmoid_loss
from mmrep.losses.pairs import Pairs, PairSpec, cover
from mmrep.losses.scores import inner_products
from mmrep.ops.gather import Gathered, Selection

FORMS = ("softmax", "sigmoid")
REDUCTIONS = ("mean", "sum")
CLIP_TEMPERATURE, SIGLIP_TEMPERATURE, SIGLIP_BIAS = 0.07, 0.1, -10.0


class PairwiseCLIPLoss(ScaledLoss, RowLoss):
    r"""Contrasts modalities two by two.

    For a pair (a, b) and the K samples that have both,
    ``L_ab = 1/(2K) sum_i [ lse_j s a_i.b_j + lse_j s b_i.a_j - 2 s a_i.b_i ]`` (Radford et al. 2021, figure 3), or in the
    sigmoid form ``L_ab = -1/K sum_ij log sigmoid( z_ij (s a_i.b_j + t) )`` (Zhai et al. 2023, equation 1). A sample that lacks
    a or b is neither a positive nor a negative of that pair: the term equals that of the batch without it.

    Args:
        pairs: ``all``, a list as ``[image-text, audio-text]``, or weights as ``{image-text: 1.0, audio-text: 0.5}``.
        anchor: Only pairs with this modality: a star, as ImageBind's.
        reduction: ``mean``: ``sum_ab w_ab L_ab / sum_ab w_ab`` (as CMC, ConFu). ``sum``: ``sum_ab w_ab L_ab`` (as the Symile
            paper's baseline). A pair that no sample of the batch has counts as 0 in both.
        form: ``softmax`` (CLIP) or ``sigmoid`` (SigLIP).
        init_temperature: The logit scale s starts at its inverse; by default .07, and .1 in the sigmoid form.
        learn_temperature: Whether the logit scale is learned.
        max_logit_scale: The logit scale is brought back to it before each step; None for no bound.
        scale_per_pair: Whether each pair has its own logit scale (and bias); needs ``modalities``.
        init_bias: Of the sigmoid form: t starts there.
        modalities: See `Loss`.
    """

    def __init__(
        self,
        *,
        pairs: PairSpec = "all",
        anchor: str | None = None,
        reduction: str = "mean",
        form: str = "softmax",
        init_temperature: float | None = None,
        learn_temperature: bool = True,
        max_logit_scale: float | None = 100.0,
        scale_per_pair: bool = False,
        init_bias: float = SIGLIP_BIAS,
        modalities: Sequence[str] | None = None,
    ) -> None:
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("form", form, FORMS)
        check_modalities(modalities, at_least=2)
        chosen = Pairs.parse(pairs, anchor, modalities)
        places = _scale_places(chosen, modalities) if scale_per_pair else None
        if init_temperature is None:
            init_temperature = SIGLIP_TEMPERATURE if form == "sigmoid" else CLIP_TEMPERATURE
        shape = () if places is None else (len(places),)
        super().__init__(
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            modalities=modalities,
            scale_shape=shape,
            pairs=pairs,
            anchor=anchor,
            reduction=reduction,
            form=form,
            scale_per_pair=scale_per_pair,
            init_bias=init_bias,
        )
        self.pairs, self.reduction, self.form, self._places = chosen, reduction, form, places
        if form == "sigmoid":
            self.logit_bias = nn.Parameter(torch.full(shape, init_bias))

    def travelling(self, names: Sequence[str]) -> Sequence[str]:
        """One modality of each pair: see `RowLoss`."""
        return cover(self.pairs.of(list(names)))

    def objective(self, gathered: Gathered) -> LossOutput:
        """See `RowLoss`."""
        if self.training:
            self.bound_scale()
        weights = self.pairs.of(list(gathered.own))
        whole = sum(weights.values()) if self.reduction == "mean" else 1.0
        selections = {pair: both for pair in weights if (both := gathered.select(pair)).total}
        terms = self._terms(selections)
        loss = weighted_sum(terms, {pair: weight / whole for pair, weight in weights.items()}, self.logit_scale)
        metrics = {"logit_scale": self.scale.detach().mean()}
        if self.form == "sigmoid":
            metrics["logit_bias"] = self.logit_bias.detach().mean()
        return LossOutput(loss, {f"{a}-{b}": term.detach() for (a, b), term in terms.items()}, metrics)

    def _terms(self, selections: Mapping[tuple[str, str], Selection]) -> dict[tuple[str, str], Tensor]:
        """Each pair's loss on this rank's rows."""
        scales = {pair: self._of_pair(self.scale, *pair) for pair in selections}
        if self.form == "softmax":
            return info_nce(selections, scales)
        return {
            pair: sigmoid_loss(pair, both, scales[pair], self._of_pair(self.logit_bias, *pair))
            for pair, both in selections.items()
        }

    @torch.no_grad()
    def pair_scalars(self, a: str, b: str) -> tuple[Tensor, Tensor | None]:
        """``logit_scale`` and ``logit_bias`` (None in the softmax form) of one pair, scalars."""
        bias = self._of_pair(self.logit_bias, a, b) if self.form == "sigmoid" else None
        return self._of_pair(self.logit_scale, a, b), bias

    def _of_pair(self, values: Tensor, a: str, b: str) -> Tensor:
        """The pair's own scale or bias; for a pair that is not trained, the mean over those that are."""
        if self._places is None:
            return values
        place = self._places.get(frozenset((a, b)))
        return values.mean() if place is None else values[place]

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The sum over the given modalities of their scaled inner products with the candidate. See `Loss.score`.

        A pair that is not trained, two arms of a star say, is scored all the same: they met at the anchor.
        """
        self.check_score(target, given, present)
        return inner_products(candidates, given, present, {n: self._of_pair(self.scale, n, target) for n in given})


def _scale_places(pairs: Pairs, modalities: Sequence[str] | None) -> dict[frozenset[str], int]:
    """Pair -> its place among the logit scales, where each has its own."""
    if modalities is None:
        raise ConfigError("scale_per_pair needs to know the pairs", fix="give modalities=[...]")
    return {frozenset(pair): place for place, pair in enumerate(pairs.of(list(modalities)))}
