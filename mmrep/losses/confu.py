"""ConFu: contrasts fused modalities with the one that is left out, besides the pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.errors import ConfigError
from mmrep.losses.base import LossOutput, RowLoss, ScaledLoss, fp32, weighted_sum
from mmrep.losses.checks import Embeddings, Presence, check_modalities
from mmrep.losses.info_nce import info_nce
from mmrep.losses.scores import inner_products, presence_patterns
from mmrep.ops.gather import Gathered
from mmrep.ops.multilinear import in_fp32


class ConFuLoss(ScaledLoss, RowLoss):
    r"""Fused pairs plus pairs (Koutoupis et al., CVPR 2026).

    ``L = [ w sum_m InfoNCE(fuse_m(all others), r_m) + (1 - w) sum_{a<b} InfoNCE(r_a, r_b) ] / (number of terms)``, for M = 3
    over 6 as published. ``fuse_m`` is a perceptron with one hidden layer over the concatenated others, and its output is
    normalised. The published one sees the encoders' features and has dropout; a loss sees embeddings, so this one fuses
    those, without dropout.

    Args:
        modalities: Which there are.
        embed_dim: Width of the rows.
        fusion_weight: w.
        fusion_width: Of the hidden layer.
        init_temperature, learn_temperature, max_logit_scale: Of the logit scale; as published it is fixed at 1 / .07.
    """

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        embed_dim: int,
        fusion_weight: float = 0.5,
        fusion_width: int = 512,
        init_temperature: float = 0.07,
        learn_temperature: bool = False,
        max_logit_scale: float | None = 100.0,
    ) -> None:
        check_modalities(modalities, at_least=3)
        if not 0 <= fusion_weight <= 1 or fusion_width < 1:
            raise ConfigError(f"fusion_weight={fusion_weight} must be in [0, 1], fusion_width={fusion_width} positive")
        super().__init__(
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
            modalities=modalities,
            embed_dim=embed_dim,
            fusion_weight=fusion_weight,
            fusion_width=fusion_width,
        )
        self.names, self.fusion_weight = list(modalities), fusion_weight
        self.fusion = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear((len(self.names) - 1) * embed_dim, fusion_width),
                    nn.ReLU(),
                    nn.Linear(fusion_width, embed_dim),
                )
                for name in self.names
            }
        )

    def prepare(self, rows: dict[str, Tensor], present: Presence | None) -> tuple[dict[str, Tensor], Presence | None]:
        """Add this rank's fused rows, as modalities of their own: they are present where all they are made of are."""
        given, rows = rows, {name: in_fp32(r) for name, r in rows.items()}
        views = max(r.shape[1] if r.ndim == 3 else 1 for r in rows.values())
        if views > 1:
            rows = {name: (r if r.ndim == 3 else r[:, None]).expand(-1, views, -1) for name, r in rows.items()}
        fused = {_fused(name): self._fuse(name, [rows[n] for n in self._others(name)]) for name in self.names}
        if present is not None:
            made = {_fused(n): torch.stack([present[o] for o in self._others(n)]).all(dim=0) for n in self.names}
            present = {**present, **made}
        return {**(rows if views > 1 else given), **fused}, present

    def travelling(self, names: Sequence[str]) -> Sequence[str]:
        """The modalities; what is fused stays at home. See `RowLoss`."""
        return self.names

    def objective(self, gathered: Gathered) -> LossOutput:
        """See `RowLoss`."""
        if self.training:
            self.bound_scale()
        weights = {(_fused(name), name): self.fusion_weight for name in self.names}
        weights |= dict.fromkeys(itertools.combinations(self.names, 2), 1 - self.fusion_weight)
        selections = {pair: both for pair in weights if (both := gathered.select(pair)).total}
        terms = info_nce(selections, dict.fromkeys(selections, self.scale))
        loss = weighted_sum(terms, weights, self.logit_scale) / len(weights)
        parts = {f"{a}-{b}": term.detach() for (a, b), term in terms.items()}
        return LossOutput(loss, parts, {"logit_scale": self.scale.detach()})

    def _others(self, name: str) -> list[str]:
        return [other for other in self.names if other != name]

    def _fuse(self, name: str, others: list[Tensor]) -> Tensor:
        together = torch.cat(others, dim=-1)
        weights = next(self.fusion[name].parameters())  # of half precision where the whole module is
        return F.normalize(in_fp32(self.fusion[name](together.to(weights.dtype))), dim=-1)

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The scaled inner product with the fusion of all others where they are given, else the sum over pairs.

        See `Loss.score`.
        """
        self.check_score(target, given, present)
        found = in_fp32(candidates)
        scores = found.new_zeros(len(next(iter(given.values()))), len(found))
        for names, asking in presence_patterns(given, present):
            rows = {name: in_fp32(given[name])[asking] for name in names}
            if set(names) == set(self._others(target)):
                rows = {target: self._fuse(target, [rows[name] for name in self._others(target)])}
            if names:
                scores[asking] = inner_products(found, rows, None, dict.fromkeys(rows, self.scale))
        return scores


def _fused(name: str) -> str:
    """The name of what is fused to find a modality; no modality can be called so."""
    return f"others({name})"
