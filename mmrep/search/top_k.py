"""`RunningTopK`: the best candidates of a stream of tiles, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor


class RunningTopK:
    """The ``k`` best candidates of each query so far; of equal scores the one that came first.

    Args:
        queries: How many.
        k: How many candidates are kept for each.
        device: Of the scores.
    """

    def __init__(self, queries: int, k: int, device: torch.device | str = "cpu") -> None:
        self.k = k
        self.scores = torch.full((queries, k), -torch.inf, device=device)
        self.numbers = torch.full((queries, k), -1, dtype=torch.int64, device=device)

    def add(self, scores: Tensor, numbers: Tensor) -> None:
        """Take a tile into account.

        Args:
            scores: ``[Q, T]``, finite.
            numbers: int64 ``[T]``: the candidates', which come back in the result.
        """
        (better,) = (scores > self.scores[:, -1:]).any(dim=1).nonzero(as_tuple=True)
        if not len(better):
            return
        # Earlier candidates stand first, and the order is stable: a tie keeps the earlier one.
        together = torch.cat([self.scores[better], scores[better].float()], dim=1)
        known = torch.cat([self.numbers[better], numbers.expand(len(better), -1)], dim=1)
        order = together.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.scores[better], self.numbers[better] = together.gather(1, order), known.gather(1, order)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and numbers ``[Q, k]``, best first; -inf and -1 where there were fewer than k."""
        return self.scores, self.numbers
