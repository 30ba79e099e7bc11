"""What tells a healthy cluster-swap run from a collapsing one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmrep.losses.prototypes import SHARED, PrototypeBank, View
from mmrep.ops.gather import sum_over_ranks

MOMENTUM = 0.01
DEAD_SHARE = 0.1


class PrototypeUsage(nn.Module):
    """How often each prototype is the nearest one, equal on all ranks.

    In training averaged over the last hundred steps or so, in evaluation of the batch alone.

    Codes cannot tell: Sinkhorn gives every prototype its share, also one that no row is near.

    Args:
        bank: The prototypes.
    """

    def __init__(self, bank: PrototypeBank) -> None:
        super().__init__()
        self.owners = bank.owners
        for head, count in enumerate(bank.counts):
            for owner in bank.owners or (SHARED,):
                self.register_buffer(f"{owner}_{head}", torch.full((count,), 1 / count))

    @torch.no_grad()
    def measure(
        self, head: int, assigning: Sequence[View], scores: Tensor, codes: Tensor, *, update: bool
    ) -> dict[str, Tensor]:
        """Figures in [0, 1] of one set of prototypes over all ranks.

        Args:
            head: Which set.
            assigning: The A views that made codes.
            scores: ``[A, B, K]``: how near its rows are to each prototype.
            codes: ``[A, B, K]``.
            update: Whether the batch enters the average, of which the figures then are.

        Returns:
            ``code_entropy`` over ln K: 1 where codes are uniform; ``prototype_usage``: entropy of the use over ln K, 1 where
            all are used alike; ``dead_prototypes``: the share that is used less than a tenth of the mean;
            ``code_agreement``: how often two modalities of a sample have the same nearest code (shared prototypes).
        """
        count, shared = codes.shape[2], not self.owners
        owners = [SHARED if shared else view.modality for view in assigning]
        used = {owner: codes.new_zeros(count) for owner in owners}
        for owner, view, near in zip(owners, assigning, scores, strict=True):
            nearest = near.argmax(dim=1)[view.valid]
            used[owner] += nearest.bincount(minlength=count)
        totals = sum_over_ranks(torch.cat([*used.values(), self._sums(assigning, codes, shared)]))
        entropy, rows, agreeing, pairs = totals[-4:].clamp(min=0)
        metrics = {"code_entropy": entropy / rows.clamp(min=1) / _log(count)}
        if shared and len({view.modality for view in assigning}) > 1:
            metrics["code_agreement"] = agreeing / pairs.clamp(min=1)
        averages = []
        for owner, uses in zip(used, totals[:-4].split(count), strict=True):
            average: Tensor = getattr(self, f"{owner}_{head}")
            current = torch.where(uses.sum() > 0, uses / uses.sum().clamp(min=1), average)
            averages.append(average.lerp_(current.to(average.dtype), MOMENTUM) if update else current)
        usage = torch.stack(averages)
        metrics["prototype_usage"] = _entropy(usage).mean() / _log(count)
        metrics["dead_prototypes"] = (usage < DEAD_SHARE / count).to(usage.dtype).mean()
        return metrics

    @staticmethod
    def _sums(assigning: Sequence[View], codes: Tensor, shared: bool) -> Tensor:
        """This rank's sums: entropy of codes, how many, agreeing pairs of modalities, how many pairs."""
        valid = torch.stack([view.valid for view in assigning])
        agreeing, pairs = codes.new_zeros(()), codes.new_zeros(())
        for (i, a), (j, b) in itertools.combinations(enumerate(assigning), 2) if shared else ():
            if a.modality != b.modality and a.number == b.number:
                both = a.valid & b.valid
                agreeing = agreeing + (codes[i].argmax(dim=1) == codes[j].argmax(dim=1))[both].sum()
                pairs = pairs + both.sum()
        return torch.stack([(_entropy(codes) * valid).sum(), valid.sum().to(codes.dtype), agreeing, pairs])


def _entropy(shares: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropy


def _log(count: int) -> float:
    return math.log(max(2, count))
