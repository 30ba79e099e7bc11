"""Zero-shot classification: which class's prompts score best with a sample, by the model's own rule.

The embedding of a class is the mean of its prompts' embeddings, each scaled to length 1, normalised again as the model
normalises (Radford et al. 2021, section 3.1.4). The rank of a sample's class is 1 + the number of other classes that do not
score less: a tie counts against the sample, as does NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.errors import MmrepError
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.metrics import share_interval
from mmrep.evaluation.retrieval import Scorer
from mmrep.model import MultimodalModel
from mmrep.ops.gather import gather_rows, rank, sum_over_ranks, world_size

MOST_SCORES = 1 << 24
"""Scores of samples and classes at once."""
PROMPTS_AT_ONCE = 4096


def class_embeddings(
    model: MultimodalModel,
    modality: str,
    prompts: Sequence[Sequence[str]],
    *,
    batch_size: int = 256,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """The classifier ``[C, D]``. A collective: each rank embeds the prompts of its share of the classes.

    Args:
        model: Whose encoder and normalisation.
        modality: Of the prompts.
        prompts: Of each class.
        batch_size: Prompts that go through the encoder at once.
        advance: Called with the number of prompts done, for a progress bar.
    """
    device = next(model.parameters()).device
    mine = torch.arange(len(prompts)).tensor_split(world_size())[rank()].tolist()
    rows = [torch.zeros(0, model.embed_dim)]
    most = max([1, *(len(prompts[number]) for number in mine)])
    step = max(1, PROMPTS_AT_ONCE // most)
    for start in range(0, len(mine), step):
        some = [list(prompts[number]) for number in mine[start : start + step]]
        items: dict[str, Any] = {modality: [text for texts in some for text in texts]}
        embedded = model.encode(batch_size=batch_size, **items)[modality]
        means = [F.normalize(part, dim=-1).mean(dim=0) for part in embedded.split([len(texts) for texts in some])]
        rows.append(torch.stack(means))
        if advance is not None:
            advance(len(embedded))
    mean = torch.cat(rows)
    unit = F.normalize(mean, dim=-1) if model.normalize == "l2" else F.layer_norm(mean, mean.shape[-1:])
    return gather_rows(unit.to(device))


def classify(
    embeddings: Embeddings,
    scorer: Scorer,
    classifier: Tensor,
    *,
    given: Sequence[str],
    target: str,
    labels: Sequence[str],
    multilabel: bool = False,
) -> dict[str, Any]:
    """Figures of zero-shot classification. A collective: every rank brings the embeddings of its own samples.

    Args:
        embeddings: Of this rank.
        scorer: Whose rule ranks.
        classifier: ``[C, D]``, embeddings of the classes.
        given: The modalities of the samples that are classified, one or several at once.
        target: The modality of the classifier.
        labels: The label that holds the class, -1 for none; where a sample may have several, one label for each class.
        multilabel: Which of the two.

    Returns:
        ``n`` samples that were classified, ``absent`` and ``unlabelled`` ones that were not, ``classes``; and ``acc1`` with
        ``acc1_ci95``, ``acc5`` (None with fewer than five classes), ``mean_per_class_recall`` over the classes that occur,
        ``chance_acc1``; or ``mean_average_precision``. None in place of a figure where no sample was classified.
    """
    there = torch.stack([embeddings.present[name] for name in given]).all(dim=0)
    truth = torch.stack([embeddings.labels[name] for name in labels], dim=1)
    known = there & (truth >= 0).all(dim=1)
    rows = {name: embeddings.rows[name][known] for name in given}
    broken = sum((~r.isfinite().all(dim=1)).sum() for r in [*rows.values(), classifier])
    counts = torch.stack(
        [known.sum(), (~there).sum(), (there & ~known).sum(), torch.as_tensor(broken).to(known.device)]
    )
    n, absent, unlabelled, not_finite = sum_over_ranks(counts).tolist()
    if not_finite:  # of all ranks together: one that stopped alone would leave the others waiting
        raise MmrepError("embeddings hold NaN or infinity", fix="the model has diverged; lower the learning rate")
    figures = {"n": n, "absent": absent, "unlabelled": unlabelled, "classes": len(classifier)}
    score = partial(_score_all, rows, scorer, classifier, target)
    if multilabel:
        scores, targets = gather_rows(score()), gather_rows(truth[known])
        return figures | {"mean_average_precision": mean_average_precision(scores, targets) if n else None}
    ranks = gather_rows(score(truth[known]))
    return figures | accuracies(ranks.cpu().numpy(), gather_rows(truth[known, 0]).cpu().numpy(), len(classifier))


def _score_all(
    rows: Mapping[str, Tensor], scorer: Scorer, classifier: Tensor, target: str, truth: Tensor | None = None
) -> Tensor:
    """Scores ``[N, C]``; or, given the classes ``[N, 1]``, their ranks int64 ``[N]``, without holding all scores."""
    parts = []
    total, step = len(next(iter(rows.values()))), max(1, MOST_SCORES // max(1, len(classifier)))
    for start in range(0, max(1, total), step):
        part = slice(start, start + step)
        given = {name: r[part] for name, r in rows.items()}
        scores = scorer.score(target=target, candidates=classifier, given=given)
        parts.append(scores if truth is None else _class_ranks(scores, truth[part]))
    return torch.cat(parts)


def _class_ranks(scores: Tensor, truth: Tensor) -> Tensor:
    """The ranks of the classes ``[n, 1]`` in scores ``[n, C]``, from 1: the class itself is one that does not score less."""
    ranks: Tensor = (~(scores < scores.gather(1, truth))).sum(dim=1)
    return ranks


def accuracies(ranks: np.ndarray, truth: np.ndarray, classes: int) -> dict[str, Any]:
    """Figures of samples with one class each.

    Args:
        ranks: int ``[N]``, from 1, of each sample's class.
        truth: int ``[N]``, the classes.
        classes: How many there are.
    """
    n = len(ranks)
    if not n:
        names = ("acc1", "acc1_ci95", "acc5", "mean_per_class_recall", "chance_acc1")
        return dict.fromkeys(names)
    right, all_of = (np.bincount(some, minlength=classes) for some in (truth[ranks == 1], truth))
    occurs = all_of > 0
    acc1 = float((ranks <= 1).sum()) / n
    return {
        "acc1": acc1,
        "acc1_ci95": list(share_interval(acc1, n)),
        "acc5": float((ranks <= 5).sum()) / n if classes >= 5 else None,
        "mean_per_class_recall": float(np.mean(right[occurs] / all_of[occurs])),
        "chance_acc1": 1 / classes,
    }


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over the classes of the average precision, as CLIP_benchmark computes it, in fp32.

    The average precision of a class is the mean, over its samples, of the share of its samples among those that score no
    less; a class without samples counts as 0, and equal scores keep the order of the samples.

    Args:
        scores: ``[N, C]``.
        targets: 0 or 1 ``[N, C]``.
    """
    places = torch.arange(1, len(scores) + 1, device=scores.device).float()
    found = []
    for column, wanted in zip(scores.T, targets.T, strict=True):
        truth = wanted[column.sort(descending=True, stable=True).indices]
        precision = truth.float().cumsum(0) / places
        found.append(precision[truth.bool()].sum() / max(float(truth.sum()), 1))
    return torch.stack(found).mean().item()
