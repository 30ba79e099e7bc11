"""The losses as their papers write them: the whole batch on one rank, every logit in memory, no trick.

Slow, and meant to be read: the losses themselves are tested against these functions. Rows are ``[K, D]`` of the K samples that
have all modalities of a term.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Mapping[str, Tensor]


def info_nce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP of two modalities (Radford et al. 2021, figure 3)."""
    logits, labels = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP of two modalities (Zhai et al. 2023, equation 1)."""
    logits = scale * x @ y.T + bias
    return -F.logsigmoid((2 * torch.eye(len(x), dtype=x.dtype) - 1) * logits).sum() / len(x)


def pairwise_clip(rows: Rows, scale: Tensor, weights: Mapping[tuple[str, str], float] | None = None) -> Tensor:
    """The weighted mean of CLIP over pairs of modalities, all where no weights are given."""
    weights = weights or dict.fromkeys(itertools.combinations(rows, 2), 1.0)
    terms = [weight * info_nce(rows[a], rows[b], scale) for (a, b), weight in weights.items()]
    return torch.stack(terms).sum() / sum(weights.values())


def symile_all(rows: Rows, scale: Tensor) -> Tensor:
    """Symile with all negatives (Saporta et al. 2024, equation 4): one tensor of K^M logits, a softmax for each anchor."""
    letters = "abcdefgh"[: len(rows)]
    logits = scale * torch.einsum(",".join(f"{letter}z" for letter in letters) + "->" + letters, *rows.values())
    count = len(next(iter(rows.values())))
    own = torch.arange(count)
    positives = logits[(own,) * len(rows)]
    sums = [logits.movedim(anchor, 0).flatten(1).logsumexp(dim=1) for anchor in range(len(rows))]
    return torch.stack([(total - positives).mean() for total in sums]).mean()


def symile_shuffled(rows: Rows, scale: Tensor, permutations: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """Symile with one negative a column (Saporta et al. 2024, algorithm 1): the true tuple stands on the diagonal."""
    count, losses = len(next(iter(rows.values()))), []
    positives = scale * torch.stack(list(rows.values())).prod(dim=0).sum(dim=1)
    for anchor in rows:
        columns = torch.stack([rows[name][order] for name, order in permutations[anchor].items()]).prod(dim=0)
        logits = scale * rows[anchor] @ columns.T
        logits = torch.where(torch.eye(count, dtype=torch.bool), positives[:, None], logits)
        losses.append(F.cross_entropy(logits, torch.arange(count)))
    return torch.stack(losses).mean()


def modality_pairwise(
    rows: Rows, scale: Tensor, positives: str = "other_view", exclude_aligned: bool = False
) -> Tensor:
    """Views ``[K, V, D]`` of every ordered pair of modalities (Franceschini et al. 2022): anchors one by one."""
    losses = []
    for a, b in itertools.permutations(rows, 2):
        samples, views = rows[a].shape[:2]
        for i, v in itertools.product(range(samples), range(views)):
            logits = scale * (rows[b] @ rows[a][i, v])
            right = {"aligned": [v], "other_view": [w for w in range(views) if w != v], "all": list(range(views))}
            columns = [
                logits[j, w]
                for j, w in itertools.product(range(samples), range(views))
                if not (exclude_aligned and (j, w) == (i, v))
            ]
            losses.append(torch.stack(columns).logsumexp(dim=0) - logits[i, right[positives]].mean())
    return torch.stack(losses).mean()


def volume(tuples: Tensor, epsilon: float) -> Tensor:
    """GRAM's volume (Cicchetti et al. 2025) of rows ``[..., M, D]``, its root and determinant kept off zero by epsilon."""
    gram = tuples @ tuples.mT + epsilon * torch.eye(tuples.shape[-2], dtype=tuples.dtype)
    found: Tensor = (torch.linalg.det(gram).clamp(min=0) + epsilon).sqrt()
    return found


def twice_squared_area(tuples: Tensor) -> Tensor:
    """TRIANGLE's size of three rows ``[..., 3, D]``, as its code takes it."""
    a, b, c = tuples.unbind(dim=-2)
    u, v = a - b, a - c
    return ((u * u).sum(-1) * (v * v).sum(-1) - (u * v).sum(-1) ** 2) / 2


def geometric(rows: Rows, scale: Tensor, size: Callable[[Tensor], Tensor], label_smoothing: float) -> Tensor:
    """Each modality's rows against the others' tuples by the size of the body they span, both ways, the mean over anchors."""
    count, losses = len(next(iter(rows.values()))), []
    for anchor in rows:
        others = torch.stack([rows[name] for name in rows if name != anchor], dim=1)
        bodies = torch.cat(
            [
                rows[anchor][:, None, None].expand(-1, count, -1, -1),
                others[None].expand(count, -1, -1, -1),
            ],
            dim=2,
        )
        logits, labels = -scale * size(bodies), torch.arange(count)
        losses += [F.cross_entropy(way, labels, label_smoothing=label_smoothing) for way in (logits, logits.T)]
    return torch.stack(losses).mean()


def confu(rows: Rows, scale: Tensor, fused: Rows, fusion_weight: float) -> Tensor:
    """ConFu (Koutoupis et al. 2026): each modality against what the others are fused to, besides the pairs."""
    fusions = [fusion_weight * info_nce(fused[name], rows[name], scale) for name in rows]
    pairs = [(1 - fusion_weight) * info_nce(rows[a], rows[b], scale) for a, b in itertools.combinations(rows, 2)]
    return torch.stack([*fusions, *pairs]).mean()


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes of one view ``[K, prototypes]`` (Caron et al. 2020, appendix A): columns to equal sums, then rows to 1."""
    codes = (scores / epsilon).exp()
    for _ in range(iterations):
        codes = codes / codes.sum(dim=0, keepdim=True)
        codes = codes / codes.sum(dim=1, keepdim=True)
    return codes


def cluster_swap(
    views: Sequence[Tensor],
    prototypes: Tensor,
    weights: Sequence[Sequence[float]],
    *,
    temperature: float,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """SwAV over any views ``[K, D]``: a's codes are predicted from b with weight ``[a][b]``, the mean over b, then a."""
    codes = [sinkhorn((view @ prototypes.T).detach(), epsilon, iterations) for view in views]
    predictions = [(view @ prototypes.T / temperature).log_softmax(dim=1) for view in views]
    losses = []
    for code, row in zip(codes, weights, strict=True):
        terms = [-w * (code * p).sum(dim=1).mean() for w, p in zip(row, predictions, strict=True)]
        if any(row):
            losses.append(torch.stack(terms).sum() / sum(row))
    return torch.stack(losses).mean()
