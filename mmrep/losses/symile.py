"""Symile: contrasts whole tuples of M modalities by their multilinear inner product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from mmrep.errors import ConfigError, check_choice
from mmrep.losses.base import LossOutput, RowLoss, fp32
from mmrep.losses.checks import Embeddings, Presence, check_modalities
from mmrep.losses.pairwise_clip import PairwiseCLIPLoss
from mmrep.losses.placeholder import Placeholders
from mmrep.losses.tuples import Permutations, all_combinations_loss, shuffled_loss
from mmrep.ops.gather import Gathered, Selection, sum_over_ranks
from mmrep.ops.multilinear import elementwise_product, in_fp32

INITIAL_LOGIT_STD = 3.0
NEGATIVES = ("shuffled", "all")
MISSING = ("drop", "placeholder")


class SymileLoss(RowLoss):
    r"""Cross-entropy of the true tuple against false ones, each modality the anchor in turn (Saporta et al. 2024).

    With ``mip(r_1..r_M) = sum_k prod_m r_m[k]`` and K samples that have every modality,
    ``L = 1/(M K) sum_m sum_i -log( exp(s mip_i) / sum_j exp(s mip(r_m,i, negatives_j)) )``. At M = 2 both kinds of negatives
    are CLIP.

    Args:
        negatives: ``shuffled``: K - 1 per anchor, the others' rows shifted cyclically, each modality by another distance,
            so that no column holds a true tuple (independent permutations, as published, keep about one per batch, which
            is then a false negative of every anchor). ``all``: every combination of the others' rows, K^(M-1) - 1.
        init_logit_scale: Log of the initial scale s. By default it is set at the first batch so that the logits of
            unrelated rows have standard deviation 3, whatever the width, M and the normalisation.
        seed: Of the shifts, which all ranks share. They change at every training step, and stay the same in evaluation.
        missing: What becomes of a sample that lacks a modality. ``drop``: it is left out, the loss equals that of the batch
            without it. ``placeholder``: a learned row stands for what it lacks, as published: see `Placeholders`; needs
            ``modalities`` and ``embed_dim``.
        pairwise_weight: Weight of a `PairwiseCLIPLoss` over all pairs that is added. Symile alone need not align any two
            modalities; with this term one can be found by one other.
        modalities: See `Loss`.
        embed_dim: Width of the rows.
    """

    step: Tensor
    scale_is_set: Tensor

    def __init__(
        self,
        *,
        negatives: str = "shuffled",
        init_logit_scale: float | None = None,
        seed: int = 0,
        missing: str = "drop",
        pairwise_weight: float = 0.0,
        modalities: Sequence[str] | None = None,
        embed_dim: int | None = None,
    ) -> None:
        check_choice("negatives", negatives, NEGATIVES)
        check_choice("missing", missing, MISSING)
        if not pairwise_weight >= 0:
            raise ConfigError(f"pairwise_weight={pairwise_weight} must not be negative")
        check_modalities(modalities, at_least=2)
        super().__init__(
            negatives=negatives,
            init_logit_scale=init_logit_scale,
            seed=seed,
            missing=missing,
            pairwise_weight=pairwise_weight,
            modalities=modalities,
            embed_dim=embed_dim,
        )
        self.negatives, self.seed, self.pairwise_weight = negatives, seed, pairwise_weight
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale or 0.0))
        self.register_buffer("scale_is_set", torch.tensor(init_logit_scale is not None))
        self.register_buffer("step", torch.tensor(0))
        self.placeholders: Placeholders | None = None
        self.pairwise: PairwiseCLIPLoss | None = None
        if missing == "placeholder":
            if self.modalities is None or embed_dim is None:
                raise ConfigError("missing='placeholder' needs modalities and embed_dim")
            self.placeholders = Placeholders(self.modalities, embed_dim)
        if pairwise_weight:
            if self.modalities is None:
                raise ConfigError("pairwise_weight needs modalities: the score must know which are not given")
            self.pairwise = PairwiseCLIPLoss(modalities=modalities)

    @property
    def scale(self) -> Tensor:
        """What multilinear products are multiplied by."""
        return self.logit_scale.exp()

    @fp32
    def forward(
        self, embeddings: Embeddings, present: Presence | None = None, *, permutations: Permutations | None = None
    ) -> LossOutput:
        """See `RowLoss`. ``permutations`` replaces the shifts, for comparison with other implementations."""
        output = self.over_views(embeddings, present, partial(self.objective, permutations=permutations))
        if self.training:
            self.step += 1
        return output

    def travelling(self, names: Sequence[str]) -> Sequence[str]:
        """With all negatives, every combination meets this rank's rows of the first modality. See `RowLoss`."""
        return names[1:] if self.negatives == "all" and self.placeholders is None else names

    def objective(self, gathered: Gathered, permutations: Permutations | None = None) -> LossOutput:
        """See `RowLoss`."""
        if self.pairwise is not None:
            gathered = replace(gathered, share=2 * gathered.share)
        tuples = self._tuples(gathered)
        loss, parts = self.logit_scale.new_zeros(()), {}
        if tuples.total:
            self._initialise_scale(tuples)
            if self.negatives == "all":
                sums = all_combinations_loss(tuples, self.scale)
            else:
                shifts = permutations or self._shifts(tuples.own, tuples.total, loss.device)
                sums = shuffled_loss(tuples, self.scale, shifts)
            terms = {anchor: tuples.mean(summed) for anchor, summed in sums.items()}
            loss = torch.stack(list(terms.values())).mean()
            parts = {anchor: term.detach() for anchor, term in terms.items()}
        share = tuples.total / max(1, len(next(iter(gathered.present.values()))))
        metrics = {"logit_scale": self.scale.detach(), "tuples": torch.tensor(share, device=loss.device)}
        if self.pairwise is not None:
            pairs = self.pairwise.objective(gathered)
            loss = loss + self.pairwise_weight * pairs.loss
            parts |= pairs.parts
            metrics["pairwise_logit_scale"] = pairs.metrics["logit_scale"]
        return LossOutput(loss, parts, metrics)

    def _tuples(self, gathered: Gathered) -> Selection:
        """The samples that have every modality; with placeholders, those that have any."""
        if self.placeholders is None:
            return gathered.select(gathered.own)
        return self.placeholders.fill(gathered)

    def _shifts(self, names: Iterable[str], total: int, device: torch.device) -> Permutations:
        """Cyclic shifts: distinct for the others of an anchor, the same on all ranks; none at all for a single other.

        By the names, so that they do not depend on the order of the modalities.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (int(self.step) + 1 if self.training else 0))
        names, columns = sorted(names), torch.arange(total, device=device)
        permutations: dict[str, dict[str, Tensor]] = {}
        for anchor in names:
            others = [name for name in names if name != anchor]
            # A single other needs no shift: its column j is the row j, a false partner everywhere but on the diagonal.
            distances = torch.randperm(total, generator=generator).tolist() if len(others) > 1 else [0]
            shifts = itertools.islice(itertools.cycle(distances), len(others))
            permutations[anchor] = {name: (columns + shift) % total for name, shift in zip(others, shifts, strict=True)}
        return permutations

    @torch.no_grad()
    def _initialise_scale(self, tuples: Selection) -> None:
        """Set the scale from the rows of all ranks: products of M unrelated rows of norms n_m in D dimensions have standard
        deviation ``prod n_m / D^((M-1)/2)``."""
        if self.scale_is_set or not self.training:
            return
        rows = list(tuples.own.values())
        norms = sum_over_ranks(torch.stack([r.norm(dim=1).sum() for r in rows])) / tuples.total
        log_norms = float(norms.clamp(min=1e-12).log().sum())
        width = rows[0].shape[1]
        self.logit_scale.fill_(math.log(INITIAL_LOGIT_STD) + 0.5 * (len(rows) - 1) * math.log(width) - log_norms)
        self.scale_is_set.fill_(True)

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The scaled multilinear product of the given rows and the candidate. See `Loss.score`.

        With placeholders, they stand for every modality that is not given. Without, a modality that is not given is left out
        of the product; since the objective trains products of all M modalities only, the pairwise term ranks where there is
        one and a modality is not given, and otherwise such a score is a heuristic: Symile need not align any two modalities.
        """
        self.check_score(target, given, present)
        if self.placeholders is not None:
            candidates, given, present = self.placeholders.complete(target, candidates, given, present)
        factors = []
        for name, rows in given.items():
            known = in_fp32(rows)
            factors.append(
                known if present is None else torch.where(present[name][:, None], known, torch.ones_like(known))
            )
        scores: Tensor = self.scale * (elementwise_product(factors) @ in_fp32(candidates).T)
        if present is not None:  # a query of which nothing is there says nothing
            scores = scores * torch.stack([present[name] for name in given]).any(dim=0)[:, None]
        if self.placeholders is None and self.pairwise is not None:
            pairs = self.pairwise.score(target=target, candidates=candidates, given=given, present=present)
            scores = torch.where(self._lacking(target, given, present, scores), pairs, scores)
        return scores

    def _lacking(self, target: str, given: Embeddings, present: Presence | None, scores: Tensor) -> Tensor:
        """Which queries lack a modality, bool ``[Q, 1]``."""
        lacking = torch.full(
            (len(scores), 1), set(self.modalities or ()) - {target} != set(given), device=scores.device
        )
        if present is not None:
            lacking = lacking | ~torch.stack([present[name] for name in given]).all(dim=0)[:, None]
        return lacking
