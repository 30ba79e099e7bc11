"""`RunningTopK`: the best candidates of a stream of tiles, in bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NOTHING = -1


class RunningTopK:
    """The ``k`` best candidates of each query so far; of equal scores the one that came first.

    Args:
        queries: How many.
        k: How many candidates are kept for each.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.scores = torch.full((queries, k), -torch.inf)
        self.numbers = torch.full((queries, k), NOTHING)
        self._contents = torch.full((queries, k), NOTHING)

    def add(self, scores: Tensor, numbers: Tensor, contents: Tensor | None = None) -> None:
        """Take a tile into account.

        Args:
            scores: ``[Q, T]``, finite.
            numbers: int64 ``[T]``: the candidates', which come back in the result.
            contents: int64 ``[T]``, not negative: of candidates with equal contents, which score alike, only the first is
                kept. All are kept where None.
        """
        if contents is not None:
            first = torch.from_numpy(np.sort(np.unique(contents.numpy(), return_index=True)[1]))
            if len(first) < len(contents):
                scores, numbers, contents = scores[:, first], numbers[first], contents[first]
        (better,) = (scores > self.scores[:, -1:]).any(dim=1).nonzero(as_tuple=True)
        if not len(better):
            return
        scores = scores[better].float()
        if contents is not None:
            kept = self._contents[better]
            known = torch.stack([torch.isin(contents, own) for own in kept])  # a query at a time: never [Q, k, T]
            scores = scores.masked_fill(known, -torch.inf)
        # Earlier candidates stand first, and the order is stable: a tie keeps the earlier one.
        together = torch.cat([self.scores[better], scores], dim=1)
        order = together.sort(dim=1, descending=True, stable=True).indices[:, : self.k]
        self.scores[better] = together.gather(1, order)
        self.numbers[better] = _joined(self.numbers[better], numbers).gather(1, order)
        if contents is not None:
            self._contents[better] = _joined(self._contents[better], contents).gather(1, order)

    def result(self) -> tuple[Tensor, Tensor]:
        """Scores and numbers ``[Q, k]``, best first; -inf and whatever where there were fewer than k."""
        return self.scores, self.numbers.masked_fill(self.scores == -torch.inf, NOTHING)


def _joined(kept: Tensor, tile: Tensor) -> Tensor:
    return torch.cat([kept, tile.expand(len(kept), -1)], dim=1)
