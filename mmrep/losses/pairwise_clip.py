"""Pairwise CLIP: InfoNCE, or its sigmoid form, between pairs of M modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import ConfigError, did_you_mean
from mmrep.losses.base import (
    Embeddings,
    LossOutput,
    Presence,
    RowLoss,
    check_modalities,
    check_score,
    fp32,
)
from mmrep.losses.info_nce import clamp_logit_scale, info_nce, make_logit_scale, sigmoid_loss
from mmrep.losses.pairs import Pairs, PairSpec
from mmrep.ops.gather import Gathered, world_size
from mmrep.ops.multilinear import in_fp32

FORMS = ("softmax", "sigmoid")
REDUCTIONS = ("mean", "sum")
SIGLIP_TEMPERATURE, SIGLIP_BIAS = 0.1, -10.0


class PairwiseCLIPLoss(RowLoss):
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
        for name, value, known in (("reduction", reduction, REDUCTIONS), ("form", form, FORMS)):
            if value not in known:
                raise ConfigError(f"{name}={value!r}", fix=did_you_mean(value, known))
        check_modalities(modalities, at_least=2)
        if init_temperature is None:
            init_temperature = SIGLIP_TEMPERATURE if form == "sigmoid" else 0.07
        super().__init__(
            pairs=pairs,
            anchor=anchor,
            reduction=reduction,
            form=form,
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            scale_per_pair=scale_per_pair,
            init_bias=init_bias,
            modalities=modalities,
        )
        self.pairs = Pairs.parse(pairs, anchor, modalities)
        self.reduction, self.form, self.max_logit_scale = reduction, form, max_logit_scale
        self._places = self._scale_places(scale_per_pair)
        shape = () if self._places is None else (len(self._places),)
        self.logit_scale = make_logit_scale(init_temperature, max_logit_scale, learn=learn_temperature, shape=shape)
        if form == "sigmoid":
            self.logit_bias = nn.Parameter(torch.full(shape, init_bias))

    def _scale_places(self, per_pair: bool) -> dict[frozenset[str], int] | None:
        """Pair -> its place among the logit scales, where each has its own."""
        if not per_pair:
            return None
        if self.modalities is None:
            raise ConfigError("scale_per_pair needs to know the pairs", fix="give modalities=[...]")
        return {frozenset(pair): place for place, pair in enumerate(self.pairs.of(self.modalities))}

    @property
    def scale(self) -> Tensor:
        """What inner products are multiplied by: a scalar, or one number a pair."""
        return self.logit_scale.exp()

    def objective(self, gathered: Gathered) -> LossOutput:
        """See `RowLoss`."""
        if self.training:
            clamp_logit_scale(self.logit_scale, self.max_logit_scale)
        weights = self.pairs.of(list(gathered.rows))
        whole = sum(weights.values()) if self.reduction == "mean" else 1.0
        terms = {pair: self._pair(gathered, *pair) for pair in weights}
        loss = torch.stack([weights[pair] / whole * term for pair, term in terms.items()]).sum()
        metrics = {"logit_scale": self.scale.detach().mean()}
        if self.form == "sigmoid":
            metrics["logit_bias"] = self.logit_bias.detach().mean()
        return LossOutput(loss, {f"{a}-{b}": term.detach() for (a, b), term in terms.items()}, metrics)

    def _pair(self, gathered: Gathered, a: str, b: str) -> Tensor:
        """The pair's loss on this rank's rows."""
        both = gathered.select((a, b))
        if not both.total:
            return self.logit_scale.new_zeros(())
        x, y, scale = both.rows[a], both.rows[b], self._of_pair(self.scale, a, b)
        if self.form == "sigmoid":
            term = sigmoid_loss(x, y, both.mine, scale, self._of_pair(self.logit_bias, a, b))
        else:
            term = info_nce(x, y, both.mine, scale)
        return term * (world_size() / both.total)

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
        check_score(target, given)
        query: Any = 0
        for name, rows in given.items():
            known = self._of_pair(self.scale, name, target) * in_fp32(rows)
            query = query + (known if present is None else known * present[name][:, None])
        scores: Tensor = query @ in_fp32(candidates).T
        return scores
