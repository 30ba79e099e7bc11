"""Symile: contrasts whole tuples of M modalities by their multilinear inner product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmrep.errors import ConfigError
from mmrep.losses.base import (
    Embeddings,
    Loss,
    LossOutput,
    Presence,
    check_embeddings,
    check_score,
    connected_zero,
    fp32,
)
from mmrep.ops.gather import gather_embeddings, world_size
from mmrep.ops.multilinear import all_combinations, elementwise_product, in_fp32

Permutations = Mapping[str, Mapping[str, Tensor]]
"""Anchor -> other modality -> ``[K]``: which of the K complete tuples stands in each column."""

INITIAL_LOGIT_STD = 3.0


class SymileLoss(Loss):
    r"""Cross-entropy of the true tuple against false ones, each modality the anchor in turn (Saporta et al. 2024).

    With ``mip(r_1..r_M) = sum_k prod_m r_m[k]`` and K samples that have every modality,
    ``L = 1/(M K) sum_m sum_i -log( exp(s mip_i) / sum_j exp(s mip(r_m,i, negatives_j)) )``. A sample that lacks a modality
    is left out: the loss equals that of the batch without it. At M = 2 both kinds of negatives are CLIP.

    Args:
        negatives: ``shuffled``: K - 1 per anchor, the others' rows shifted cyclically, each modality by another distance,
            so that no column holds a true tuple (independent permutations, as published, keep about one per batch, which
            is then a false negative of every anchor). ``all``: every combination of the others' rows, K^(M-1) - 1.
        init_logit_scale: Log of the initial scale s. By default it is set at the first batch so that the logits of
            unrelated rows have standard deviation 3, whatever the width, M and the normalisation.
        seed: Of the shifts, which all ranks share. They change at every training step, and stay the same in evaluation.
    """

    step: Tensor
    scale_is_set: Tensor

    def __init__(self, *, negatives: str = "shuffled", init_logit_scale: float | None = None, seed: int = 0) -> None:
        if negatives not in ("shuffled", "all"):
            raise ConfigError(f"negatives={negatives!r}", fix="choose 'shuffled' or 'all'")
        super().__init__(negatives=negatives, init_logit_scale=init_logit_scale, seed=seed)
        self.negatives, self.seed = negatives, seed
        self.logit_scale = nn.Parameter(torch.tensor(init_logit_scale or 0.0))
        self.register_buffer("scale_is_set", torch.tensor(init_logit_scale is not None))
        self.register_buffer("step", torch.tensor(0))

    @property
    def scale(self) -> Tensor:
        """What multilinear products are multiplied by."""
        return self.logit_scale.exp()

    @fp32
    def forward(
        self, embeddings: Embeddings, present: Presence | None = None, *, permutations: Permutations | None = None
    ) -> LossOutput:
        """See `Loss`. ``permutations`` replaces the shifts, for comparison with other implementations.

        Raises:
            LossError: On fewer than two modalities, or embeddings of unequal shape.
        """
        check_embeddings(embeddings, present, at_least=2)
        gathered = gather_embeddings({name: in_fp32(rows) for name, rows in embeddings.items()}, present)
        complete = torch.stack(list(gathered.present.values())).all(dim=0)
        rows = {name: everyone[complete] for name, everyone in gathered.rows.items()}
        first = int(complete[: gathered.offset].sum())
        mine = slice(first, first + int(complete[gathered.offset : gathered.offset + gathered.local].sum()))
        total = int(complete.sum())
        loss = connected_zero(gathered.rows, [self.logit_scale])
        parts: dict[str, Tensor] = {}
        if total:
            self._initialise_scale(rows)
            shifts = permutations or self._shifts(list(rows), total, loss.device)
            for anchor in rows:
                term = self._anchor(anchor, rows, mine, shifts) * (world_size() / total)
                loss = loss + term / len(rows)
                parts[anchor] = term.detach()
        if self.training:
            self.step += 1
        return LossOutput(loss, parts, {"logit_scale": self.scale.detach(), "complete": complete.float().mean()})

    def _anchor(self, anchor: str, rows: dict[str, Tensor], mine: slice, permutations: Permutations) -> Tensor:
        """The summed cross-entropy of this rank's rows as anchors."""
        others = [name for name in rows if name != anchor]
        total = len(rows[anchor])
        if self.negatives == "all":
            columns = all_combinations([rows[name] for name in others])
            stride = sum(total**power for power in range(len(others)))  # of column (i, i, ..., i)
        else:
            columns = elementwise_product([rows[name][permutations[anchor][name]] for name in others])
            stride = 1
        logits = self.scale * (rows[anchor][mine] @ columns.T)
        positive = self.scale * elementwise_product([rows[name][mine] for name in rows]).sum(-1)
        place = torch.arange(mine.start, mine.stop, device=logits.device) * stride
        logits = logits.scatter(1, place[:, None], positive[:, None])
        return (logits.logsumexp(dim=1) - positive).sum()

    def _shifts(self, names: list[str], total: int, device: torch.device) -> Permutations:
        """Cyclic shifts: distinct for the others of an anchor, the same on all ranks; none at all for a single other."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + (int(self.step) + 1 if self.training else 0))
        columns = torch.arange(total, device=device)
        permutations: dict[str, dict[str, Tensor]] = {}
        for anchor in names:
            others = [name for name in names if name != anchor]
            # A single other needs no shift: its column j is the row j, a false partner everywhere but on the diagonal.
            distances = torch.randperm(total, generator=generator).tolist() if len(others) > 1 else [0]
            shifts = itertools.islice(itertools.cycle(distances), len(others))
            permutations[anchor] = {name: (columns + shift) % total for name, shift in zip(others, shifts, strict=True)}
        return permutations

    @torch.no_grad()
    def _initialise_scale(self, rows: dict[str, Tensor]) -> None:
        """Set the scale from the gathered rows (so equally on all ranks): products of M unrelated rows of norms n_m in D
        dimensions have standard deviation ``prod n_m / D^((M-1)/2)``."""
        if self.scale_is_set or not self.training:
            return
        width = next(iter(rows.values())).shape[1]
        log_norms = sum(math.log(max(float(r.norm(dim=1).mean()), 1e-12)) for r in rows.values())
        self.logit_scale.fill_(math.log(INITIAL_LOGIT_STD) + 0.5 * (len(rows) - 1) * math.log(width) - log_norms)
        self.scale_is_set.fill_(True)

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The scaled multilinear product of the given rows and the candidate. See `Loss.score`.

        A modality that is neither given nor asked for is left out of the product. The objective trains products of all M
        modalities only, so that such a score is a heuristic: Symile need not align any two modalities.
        """
        check_score(target, given)
        factors = []
        for name, rows in given.items():
            known = in_fp32(rows)
            factors.append(
                known if present is None else torch.where(present[name][:, None], known, torch.ones_like(known))
            )
        scores: Tensor = self.scale * (elementwise_product(factors) @ in_fp32(candidates).T)
        return scores
