"""Pairwise CLIP: symmetric InfoNCE between every two of M modalities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
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
from mmrep.ops.gather import Gathered, gather_embeddings, world_size
from mmrep.ops.multilinear import in_fp32

MAX_SCALE = 100.0


class PairwiseCLIPLoss(Loss):
    r"""InfoNCE in both directions, over all pairs of modalities.

    For a pair (a, b) and the K samples that have both,
    ``L_ab = 1/(2K) sum_i [ lse_j s a_i.b_j + lse_j s a_j.b_i - 2 s a_i.b_i ]`` (Radford et al. 2021, figure 3; Oord et al.
    2018, equation 4), and the loss is the mean (or sum) of ``L_ab`` over the pairs. A sample that lacks a or b is neither a
    positive nor a negative of that pair: the term equals that of the batch without it. Papers differ in the last step:
    CMC and ConFu take the mean over the pairs, the Symile paper's baseline takes the sum.

    Args:
        init_temperature: The logit scale starts at its inverse.
        learn_temperature: Whether the logit scale is a parameter.
        reduction: ``mean`` or ``sum`` over the pairs.
    """

    def __init__(
        self, *, init_temperature: float = 0.07, learn_temperature: bool = True, reduction: str = "mean"
    ) -> None:
        if init_temperature <= 0 or reduction not in ("mean", "sum"):
            raise ConfigError(
                f"init_temperature={init_temperature} must be positive, reduction={reduction!r} mean or sum"
            )
        super().__init__(init_temperature=init_temperature, learn_temperature=learn_temperature, reduction=reduction)
        self.reduction = reduction
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / init_temperature)), requires_grad=learn_temperature)

    @property
    def scale(self) -> Tensor:
        """What logits are multiplied by: exp of the parameter, at most 100 (CLIP, section 2.5)."""
        return self.logit_scale.exp().clamp(max=MAX_SCALE)

    @fp32
    def forward(self, embeddings: Embeddings, present: Presence | None = None) -> LossOutput:
        """See `Loss`. Rows are used as they come: the model normalises them.

        Raises:
            LossError: On fewer than two modalities, or embeddings of unequal shape.
        """
        check_embeddings(embeddings, present, at_least=2)
        gathered = gather_embeddings({name: in_fp32(rows) for name, rows in embeddings.items()}, present)
        pairs = list(itertools.combinations(embeddings, 2))
        parts: dict[str, Tensor] = {}
        metrics = {"logit_scale": self.scale.detach()}
        loss = connected_zero(gathered.rows, [self.logit_scale])
        for a, b in pairs:
            term, alignment = self._pair(gathered, a, b)
            loss = loss + term / (len(pairs) if self.reduction == "mean" else 1)
            parts[f"{a}-{b}"] = term.detach()
            metrics[f"alignment/{a}-{b}"] = alignment
        return LossOutput(loss, parts, metrics)

    def _pair(self, gathered: Gathered, a: str, b: str) -> tuple[Tensor, Tensor]:
        """The pair's term on this rank's rows, and the mean inner product of its positives over all ranks."""
        both = gathered.present[a] & gathered.present[b]
        total = int(both.sum())
        x, y = gathered.rows[a][both], gathered.rows[b][both]
        if total == 0:
            return connected_zero({a: x, b: y}, []), x.new_zeros(())
        first = int(both[: gathered.offset].sum())
        mine = slice(first, first + int(both[gathered.offset : gathered.offset + gathered.local].sum()))
        positive = torch.arange(mine.start, mine.stop, device=x.device)
        logits = self.scale * (x[mine] @ y.T), self.scale * (y[mine] @ x.T)
        entropy = torch.stack([F.cross_entropy(direction, positive, reduction="sum") for direction in logits]).sum()
        alignment = (x.detach() * y.detach()).sum(-1).mean()
        return entropy * (world_size() / (2 * total)), alignment

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """The scaled sum over the given modalities of their inner products with the candidate. See `Loss.score`."""
        check_score(target, given)
        query: Any = 0
        for name, rows in given.items():
            known = in_fp32(rows)
            query = query + (known if present is None else known * present[name][:, None])
        scores: Tensor = self.scale * (query @ in_fp32(candidates).T)
        return scores
