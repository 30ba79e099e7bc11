"""ConFu: contrasts fused modalities with the one that is left out, besides the pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.errors import ConfigError, LossError
from mmrep.losses.base import (
    Embeddings,
    LossOutput,
    Presence,
    RowLoss,
    check_modalities,
    check_score,
    fp32,
)
from mmrep.losses.geometric import presence_patterns
from mmrep.losses.info_nce import clamp_logit_scale, info_nce, make_logit_scale
from mmrep.ops.gather import Gathered, world_size
from mmrep.ops.multilinear import in_fp32


class ConFuLoss(RowLoss):
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
            modalities=modalities,
            embed_dim=embed_dim,
            fusion_weight=fusion_weight,
            fusion_width=fusion_width,
            init_temperature=init_temperature,
            learn_temperature=learn_temperature,
            max_logit_scale=max_logit_scale,
        )
        self.names, self.fusion_weight, self.max_logit_scale = list(modalities), fusion_weight, max_logit_scale
        self.logit_scale = make_logit_scale(init_temperature, max_logit_scale, learn=learn_temperature)
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

    @property
    def scale(self) -> Tensor:
        """What inner products are multiplied by."""
        return self.logit_scale.exp()

    def prepare(self, rows: dict[str, Tensor], present: Presence | None) -> tuple[dict[str, Tensor], Presence | None]:
        """Add this rank's fused rows, as modalities of their own: they are present where all they are made of are."""
        if lacking := [name for name in self.names if name not in rows]:
            raise LossError(f"ConFu fuses {self.names}, and {lacking} do not come")
        views = max(r.shape[1] if r.ndim == 3 else 1 for r in rows.values())
        if views > 1:
            rows = {name: (r if r.ndim == 3 else r[:, None]).expand(-1, views, -1) for name, r in rows.items()}
        fused = {_fused(name): self._fuse(name, [rows[n] for n in self._others(name)]) for name in self.names}
        if present is not None:
            made = {_fused(n): torch.stack([present[o] for o in self._others(n)]).all(dim=0) for n in self.names}
            present = {**present, **made}
        return {**rows, **fused}, present

    def objective(self, gathered: Gathered) -> LossOutput:
        """See `RowLoss`."""
        if self.training:
            clamp_logit_scale(self.logit_scale, self.max_logit_scale)
        pairs = list(itertools.combinations(self.names, 2))
        weights = {(_fused(name), name): self.fusion_weight for name in self.names}
        weights |= dict.fromkeys(pairs, 1 - self.fusion_weight)
        terms = {pair: self._term(gathered, *pair) for pair in weights}
        loss = torch.stack([weights[pair] * term for pair, term in terms.items()]).sum() / len(terms)
        parts = {f"{a}-{b}": term.detach() for (a, b), term in terms.items()}
        return LossOutput(loss, parts, {"logit_scale": self.scale.detach()})

    def _term(self, gathered: Gathered, a: str, b: str) -> Tensor:
        both = gathered.select((a, b))
        if not both.total:
            return self.logit_scale.new_zeros(())
        return info_nce(both.rows[a], both.rows[b], both.mine, self.scale) * (world_size() / both.total)

    def _others(self, name: str) -> list[str]:
        return [other for other in self.names if other != name]

    def _fuse(self, name: str, others: list[Tensor]) -> Tensor:
        return F.normalize(self.fusion[name](torch.cat(others, dim=-1)), dim=-1)

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The scaled inner product with the fusion of all others where they are given, else the sum over pairs.

        See `Loss.score`.
        """
        check_score(target, given)
        found = in_fp32(candidates)
        scores = found.new_zeros(len(next(iter(given.values()))), len(found))
        for names, asking in presence_patterns(given, present):
            rows = {name: in_fp32(given[name])[asking] for name in names}
            if set(names) == set(self._others(target)):
                scores[asking] = self.scale * self._fuse(target, [rows[n] for n in self._others(target)]) @ found.T
            elif names:
                scores[asking] = self.scale * torch.stack(list(rows.values())).sum(dim=0) @ found.T
        return scores


def _fused(name: str) -> str:
    """The name of what is fused to find a modality; no modality can be called so."""
    return f"others({name})"
