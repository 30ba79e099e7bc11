"""Inputs and losses that the loss tests share: every loss, with every option."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.losses import (
    ClusterSwapLoss,
    ConFuLoss,
    GRAMLoss,
    ModalityPairwiseLoss,
    PairwiseCLIPLoss,
    SymileLoss,
    TriangleLoss,
)

NAMES = ("a", "b", "c")
N, VIEWS, DIM = 8, 3, 6
"""Samples of a batch (the queues below are full after one), views, width."""

clip = PairwiseCLIPLoss
symile = partial(SymileLoss, modalities=NAMES, embed_dim=DIM)
swap = partial(ClusterSwapLoss, modalities=NAMES, embed_dim=DIM, num_prototypes=7)
one_image = partial(ClusterSwapLoss, modalities=["a"], embed_dim=DIM, num_prototypes=7)
pairwise = ModalityPairwiseLoss
confu = partial(ConFuLoss, modalities=NAMES, embed_dim=DIM, fusion_width=9)
MATRIX = [[0.0, 2.0, 1.0], [0.5, 0.0, 0.0], [3.0, 1.0, 0.0]]

LOSSES: dict[str, Any] = {
    "clip": clip,
    "clip-sum": partial(clip, reduction="sum"),
    "clip-star": partial(clip, anchor="b"),
    "clip-weights": partial(clip, pairs={"a-b": 2.0, "c-b": 0.5}),
    "clip-fixed": partial(clip, learn_temperature=False),
    "clip-unbounded": partial(clip, max_logit_scale=None, init_temperature=0.005),
    "clip-per-pair": partial(clip, scale_per_pair=True, modalities=NAMES),
    "clip-sigmoid": partial(clip, form="sigmoid"),
    "clip-sigmoid-per-pair": partial(clip, form="sigmoid", scale_per_pair=True, modalities=NAMES),
    "symile-shuffled": symile,
    "symile-all": partial(symile, negatives="all"),
    "symile-fixed-start": partial(symile, init_logit_scale=2.0),
    "symile-placeholder": partial(symile, missing="placeholder"),
    "symile-placeholder-all": partial(symile, missing="placeholder", negatives="all"),
    "symile-pairwise": partial(symile, pairwise_weight=0.7),
    "swap-cross": swap,
    "swap-all": partial(swap, pairs="all"),
    "swap-intra": partial(swap, pairs="intra"),
    "swap-matrix": partial(swap, pairs=MATRIX),
    "swap-per-modality": partial(swap, prototypes="per_modality"),
    "swap-heads": partial(swap, num_prototypes=[4, 7]),
    "swap-queue": partial(swap, teacher_views=2, queue_length=N),
    "swap-product": partial(swap, codes="product"),
    "swap-mean-queue": partial(swap, codes="mean", teacher_views=1, queue_length=N),
    "swap-modality": partial(swap, marginals="modality"),
    "swap-union": partial(swap, marginals="union"),
    "swap-freeze": partial(swap, freeze_steps=9),
    "swap-hard": partial(swap, hard_steps=9),
    "swap-one-modality": one_image,
    "swap-one-modality-queue": partial(one_image, teacher_views=2, queue_length=N),
    "pairwise-aligned": partial(pairwise, positives="aligned"),
    "pairwise-other": pairwise,
    "pairwise-all": partial(pairwise, positives="all", learn_temperature=True),
    "pairwise-legacy": partial(pairwise, exclude_aligned=True, legacy_scale=0.5),
    "pairwise-weights": partial(pairwise, weights=MATRIX, modalities=NAMES),
    "gram": GRAMLoss,
    "gram-anchor": partial(GRAMLoss, anchor="b", label_smoothing=0.0),
    "triangle": TriangleLoss,
    "triangle-root": partial(TriangleLoss, root=True),
    "confu": confu,
    "confu-learned": partial(confu, fusion_weight=0.8, learn_temperature=True),
}
WITH_VIEWS = ("swap-all", "swap-intra", "swap-matrix", "swap-queue", "swap-heads", "swap-one-modality", "pairwise-")
"""The start of the names of those that want views."""


def unit_rows(names: Sequence[str], n: int, d: int, seed: int = 0) -> dict[str, Tensor]:
    """Random rows of length 1, float64 ``[n, d]`` each."""
    generator = torch.Generator().manual_seed(seed)
    return {name: F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1) for name in names}


def random_presence(names: Sequence[str], n: int, seed: int = 0, share: float = 0.7) -> dict[str, Tensor]:
    """Which rows are there, at random."""
    generator = torch.Generator().manual_seed(seed + 1)
    return {name: torch.rand(n, generator=generator) < share for name in names}
