"""Symile's cross-entropies: of true tuples against shuffled ones, or against every combination."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmrep.ops.gather import Selection, logsumexp_over_ranks
from mmrep.ops.multilinear import all_combinations, elementwise_product
from mmrep.ops.product_logsumexp import product_logsumexp, safe_logsumexp
from mmrep.ops.row_cross_entropy import row_cross_entropy

Permutations = Mapping[str, Mapping[str, Tensor]]
"""Anchor -> other modality -> ``[K]``: which of the K complete tuples stands in each column."""


def shuffled_loss(tuples: Selection, scale: Tensor, permutations: Permutations) -> dict[str, Tensor]:
    """Each anchor's cross-entropy against one column a sample, summed over this rank's rows.

    Args:
        tuples: The samples that have every modality; all modalities must have travelled.
        scale: What multilinear products are multiplied by.
        permutations: Which samples a column is made of.
    """
    positives = scale * elementwise_product(list(tuples.own.values())).sum(dim=-1)
    sums = {}
    for anchor, own in tuples.own.items():
        (first, order), *others = permutations[anchor].items()
        # The columns may stand in any order: in that of the first modality, its rows need not be copied.
        back = order.argsort()
        columns = elementwise_product([tuples.rows[first], *(tuples.rows[name][p[back]] for name, p in others)])
        sums[anchor] = row_cross_entropy(own, columns, positives, scale, order[tuples.mine])
    return sums


def all_combinations_loss(tuples: Selection, scale: Tensor) -> dict[str, Tensor]:
    """Each anchor's cross-entropy against all K^(M-1) combinations of the others, summed over this rank's rows.

    Only the order of the indices tells the anchors' tensors of logits apart, so that one pass serves all of them. Modalities
    are split into two groups, products of one against products of the other, and the log-sum-exps of rows and columns are
    summed further over all modalities of the group but the anchor.

    Args:
        tuples: The samples that have every modality; all but the first must have travelled.
        scale: What multilinear products are multiplied by.
    """
    total, (first, *others) = tuples.total, tuples.own
    left, right = others[: len(others) // 2], others[len(others) // 2 :]
    rows, columns, positives = product_logsumexp(
        tuples.own[first],
        all_combinations([tuples.rows[name] for name in right]),
        scale,
        rest=all_combinations([tuples.rows[name] for name in left]) if left else None,
        offset=tuples.mine.start,
        rest_stride=_stride(total, len(left)),
        stride=_stride(total, len(right)),
        terms=tuples.share,
    )
    by_left = rows.reshape(-1, *[total] * len(left))
    by_right = columns.reshape(*[total] * len(right))
    partial = [_marginal(by_left, 1 + place, total) for place in range(len(left))]
    partial += [_marginal(by_right, place, total) for place in range(len(right))]
    of_first = by_left.reshape(len(by_left), total ** len(left)).logsumexp(dim=1)
    whole = [marginal[tuples.mine] for marginal in logsumexp_over_ranks(partial)]
    return {
        name: (sums - positives).sum() for name, sums in zip([first, *left, *right], [of_first, *whole], strict=True)
    }


def _stride(total: int, modalities: int) -> int:
    """From the combination ``(i, ..., i)`` to the next of its kind, the last index running fastest."""
    return sum(total**power for power in range(modalities))


def _marginal(sums: Tensor, dim: int, total: int) -> Tensor:
    """Log-sum-exp over all dimensions but one."""
    return safe_logsumexp(sums.movedim(dim, 0).reshape(total, -1) if sums.numel() else sums.new_empty(total, 0), 1)
