"""The terms that contrast two sets of rows: InfoNCE and its sigmoid form."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmrep.ops.gather import Selection, logsumexp_over_ranks
from mmrep.ops.product_logsumexp import product_logsumexp
from mmrep.ops.sigmoid_cross_entropy import sigmoid_cross_entropy

Pair = tuple[str, str]


def info_nce(selections: Mapping[Pair, Selection], scales: Mapping[Pair, Tensor]) -> dict[Pair, Tensor]:
    """Symmetric InfoNCE of each pair (Oord et al. 2018, equation 4; Radford et al. 2021, figure 3): this rank's share.

    ``1/2K sum_i [ lse_j s x_i.y_j + lse_j s y_i.x_j - 2 s x_i.y_i ]``. This rank's rows of one modality meet all rows of the
    other: what is summed over columns is then added up over the ranks, once for all pairs.

    Args:
        selections: The samples of each pair, at least one; one modality of each must have travelled.
        scales: What inner products are multiplied by.
    """
    directions = {}
    for pair, both in selections.items():
        one, other = orient(pair, both)
        x, y, scale = both.own[one], both.rows[other], scales[pair]
        terms = len(selections) * both.share
        directions[pair] = product_logsumexp(x, y, scale, offset=both.mine.start, terms=terms)
    columns = logsumexp_over_ranks([columns for _, columns, _ in directions.values()])
    found = {}
    for (pair, both), whole in zip(selections.items(), columns, strict=True):
        rows, _, positives = directions[pair]
        found[pair] = both.mean(((rows - positives) + (whole[both.mine] - positives)).sum() / 2)
    return found


def sigmoid_loss(pair: Pair, both: Selection, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss of a pair (Zhai et al. 2023, equation 1), this rank's share: each of the K^2 combinations is a yes or a no.

    ``- 1/K sum_ij log sigmoid( z_ij (s x_i.y_j + b) )`` with z = 1 on the diagonal and -1 elsewhere; arguments as `info_nce`.
    """
    one, other = orient(pair, both)
    return both.mean(sigmoid_cross_entropy(both.own[one], both.rows[other], scale, bias, offset=both.mine.start))


def orient(pair: Pair, both: Selection) -> Pair:
    """Whose rows are this rank's, and whose are everyone's."""
    return pair if pair[1] in both.rows else (pair[1], pair[0])
