"""The model of a training step over many GPUs: what a loss computes, sends and keeps, and how long a step takes.

Bytes are those that a rank sends around a ring (`benchmarks.traffic`); tests hold these formulas to what is counted at every
collective. Memory is held to the peaks in ``results/losses.json``. Nothing here was timed on a GPU: see ``scaling.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmrep.losses.geometric import LIVE_COPIES, STRIP
from mmrep.ops.paths import choose_path
from mmrep.ops.row_cross_entropy import GPU_STRIP
from mmrep.ops.tiles import GPU_TILE

FP32 = 4
"""Bytes of a number: the model normalises rows in fp32, and so they travel."""
SINKHORN = 3
FUSION_WIDTH = 512
"""Defaults of `ClusterSwapLoss` and `ConFuLoss`."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a step.

    Attributes:
        gpus: W.
        batch: N, samples of all GPUs; a multiple of ``gpus``.
        width: D, of the embedding space.
        modalities: M.
        views: Of each sample and modality, for modality-pairwise and SwAV.
        prototypes: Of SwAV.
        tile: Side of a tile of logits.
        strip: Logits of a strip, where a loss goes by strips of rows.
    """

    gpus: int
    batch: int
    width: int = 512
    modalities: int = 2
    views: int = 1
    prototypes: int = 3000
    tile: int = GPU_TILE
    strip: int = GPU_STRIP

    @property
    def rows(self) -> int:
        """n, samples of a GPU."""
        return self.batch // self.gpus

    @property
    def others(self) -> float:
        """The share of a collective's result that leaves or reaches a rank: (W - 1) / W."""
        return (self.gpus - 1) / self.gpus

    @property
    def pairs(self) -> int:
        """Of modalities."""
        return math.comb(self.modalities, 2)


@dataclass(frozen=True)
class LossCost:
    """One rank's part of a loss, forward and backward.

    Attributes:
        flops: Of matrix products, two for a multiply-add.
        gathered: Bytes that a rank sends so that all have the rows.
        returned: Bytes that a rank sends so that gradients reach the rank of their rows.
        small: Bytes of everything else: columns' sums, presence, counts.
        memory: Bytes beside this rank's rows.
    """

    flops: float
    gathered: float
    returned: float
    small: float
    memory: float

    @property
    def sent(self) -> float:
        """All bytes that a rank sends."""
        return self.gathered + self.returned + self.small


def pairwise(shape: Shape) -> LossCost:
    """Softmax over all pairs: M - 1 modalities travel, each pair is one pass over tiles."""
    return _over_pairs(shape, shape.pairs, shape.modalities - 1, shape.modalities)


def modality_pairwise(shape: Shape) -> LossCost:
    """As pairwise, each sample with all its views."""
    return _over_pairs(shape, shape.pairs, shape.modalities - 1, shape.modalities, shape.views)


def confu(shape: Shape) -> LossCost:
    """All pairs, and each modality with the fusion of the others, which stays at home."""
    m, d = shape.modalities, shape.width
    cost = _over_pairs(shape, shape.pairs + m, m, 2 * m)
    fusion = 3 * m * 2 * shape.rows * ((m - 1) * d * FUSION_WIDTH + FUSION_WIDTH * d)
    hidden = FP32 * 2 * m * shape.rows * ((m - 1) * d + FUSION_WIDTH)
    return LossCost(cost.flops + fusion, cost.gathered, cost.returned, cost.small, cost.memory + hidden)


def siglip(shape: Shape) -> LossCost:
    """Sigmoid over all pairs: gradients are made in the forward pass, three products, and no sums travel."""
    n, total, d, travelling = shape.rows, shape.batch, shape.width, shape.modalities - 1
    made_forward = FP32 * d * shape.pairs * (n + total)
    tiles = 3 * FP32 * min(n, shape.tile) * min(total, shape.tile)
    return LossCost(
        shape.pairs * _products(3, n, total, d),
        *_rows_travel(shape, travelling),
        _presence(shape, shape.modalities),
        made_forward + _row_memory(shape, travelling) + tiles,
    )


def symile_shuffled(shape: Shape) -> LossCost:
    """Each modality the anchor against one column a sample, three products; all modalities travel."""
    n, total, d, m = shape.rows, shape.batch, shape.width, shape.modalities
    kept = FP32 * d * m * (n + total + total + (m - 2) * total)  # gradients of both sides, columns, shuffled rows
    working = FP32 * d * (5 * total + m * n + (m * total if shape.gpus > 1 else 0) * 3)
    strip = FP32 * max(min(n, 256) * total, min(n * total, shape.strip))
    return LossCost(
        m * _products(3, n, total, d),
        *_rows_travel(shape, m),
        _presence(shape, m),
        kept + working + strip,
    )


def symile_all(shape: Shape) -> LossCost:
    """All N^(M-1) combinations with this rank's rows of the first modality, one pass for all anchors."""
    n, total, d, m = shape.rows, shape.batch, shape.width, shape.modalities
    left = (m - 1) // 2
    rows, columns = n * total**left, total ** (m - 1 - left)
    products, kept = _tile_products(rows, columns, 1)
    tile_rows, tile_columns = min(rows, shape.tile), min(columns, shape.tile)
    combinations = FP32 * d * (total**left + columns if m > 3 else 0)
    working = FP32 * (2 * tile_rows * tile_columns + 2 * tile_rows * d + 4 * (rows + columns)) + combinations
    return LossCost(
        _products(products, rows, columns, d),
        *_rows_travel(shape, m - 1),
        _presence(shape, m) + _sums(shape, (m - 1) * total),
        kept + working + _row_memory(shape, m - 1),
    )


def gram(shape: Shape) -> LossCost:
    """Each modality the anchor against the tuples of all samples: M - 1 numbers a logit, from as many products."""
    return _bodies(shape, shape.modalities - 1)


def triangle(shape: Shape) -> LossCost:
    """Two inner products a logit."""
    return _bodies(shape, 2)


def swav(shape: Shape) -> LossCost:
    """Each view predicts the codes of the other modalities' views: no row travels, but Sinkhorn's masses do."""
    n, d, k, views = shape.rows, shape.width, shape.prototypes, shape.modalities * shape.views
    flops = _products(3, n * views, k, d) + 2 * 2 * n * views * views * k + SINKHORN * 2 * 2 * n * views * k
    masses = SINKHORN * 2 * 2 * shape.others * views * k * FP32  # of every view, a maximum and a sum over the ranks
    counts = 2 * shape.others * ((views * views + views) * 8 + (k + 4) * FP32)
    return LossCost(flops, 0.0, 0.0, masses + counts, 6 * FP32 * n * views * k)


LOSSES: dict[str, Callable[[Shape], LossCost]] = {
    "pairwise": pairwise,
    "siglip": siglip,
    "symile-shuffled": symile_shuffled,
    "symile-all": symile_all,
    "swav": swav,
    "modality-pairwise": modality_pairwise,
    "gram": gram,
    "triangle": triangle,
    "confu": confu,
}


def _over_pairs(shape: Shape, pairs: int, travelling: int, named: int, views: int = 1) -> LossCost:
    """Pairs that share one gather; ``named`` modalities have presence."""
    n, total = shape.rows * views, shape.batch * views
    products, kept = _tile_products(n, total, pairs)
    tiles = 2 * FP32 * min(n, shape.tile) * min(total, shape.tile)
    return LossCost(
        pairs * _products(products, n, total, shape.width),
        *_rows_travel(shape, travelling * views),
        _presence(shape, named) + _sums(shape, pairs * total),
        kept + views * _row_memory(shape, travelling) + tiles,
    )


def _bodies(shape: Shape, inner: int) -> LossCost:
    """GRAM and TRIANGLE, with every modality the anchor in turn."""
    n, total, d, m = shape.rows, shape.batch, shape.width, shape.modalities
    again = choose_path(n, total, torch.float32, terms=m * LIVE_COPIES).name == "tiled"
    strips = LIVE_COPIES * FP32 * total * (min(n, STRIP) if again else m * n)
    tuples = total * (m - 1) * d * (8 + 8 + FP32)  # rows of the others and their basis, in fp64
    return LossCost(
        m * inner * _products(4 if again else 3, n, total, d),
        *_rows_travel(shape, m),
        _presence(shape, m) + _sums(shape, m * total),
        strips + tuples + _row_memory(shape, m),
    )


def _products(count: int, rows: int, columns: int, width: int) -> float:
    return count * 2.0 * rows * columns * width


def _tile_products(rows: int, columns: int, terms: int) -> tuple[int, int]:
    """Matrix products of a pass forward and backward, and bytes of the logits that are kept."""
    path = choose_path(rows, columns, torch.float32, terms=terms)
    return (4, 0) if path.name == "tiled" else (3, FP32 * rows * columns * terms)


def _rows_travel(shape: Shape, modalities: int) -> tuple[float, float]:
    """Bytes sent by the all-gather of rows, and by the reduce-scatter of their gradients."""
    size = shape.others * shape.batch * modalities * shape.width * FP32
    return size, size


def _presence(shape: Shape, modalities: int) -> float:
    """How many rows each rank has, and a byte a sample and modality."""
    return 2 * shape.others * shape.gpus * 8 + shape.others * shape.batch * modalities


def _sums(shape: Shape, columns: int) -> float:
    """Of columns: their maximum, their sum and its gradient, each added up over the ranks."""
    return 3 * 2 * shape.others * columns * FP32


def _row_memory(shape: Shape, travelling: int) -> float:
    """Gradients of this rank's rows, rows of all ranks with their gradients, what is sent of them, and one term's own."""
    n, total = shape.rows, shape.batch
    away = 3 * travelling * total if shape.gpus > 1 else 0
    return FP32 * shape.width * (shape.modalities * n + away + 1.5 * (n + total))


@dataclass(frozen=True)
class Cluster:
    """Machines and model.

    Attributes:
        samples_per_second: Of one GPU through the encoders, forward and backward; nothing else.
        loss_tflops: 10^12 operations a second that the loss's matrix products reach.
        intra, inter: 10^9 bytes a second and GPU in one direction, inside a node and out of it.
        gpus_per_node: How many share a node.
        parameters: Whose gradients, in fp32, are added up over the GPUs.
        waiting: What a step takes longer each time the nodes are doubled: waiting for the slowest.
    """

    samples_per_second: float
    loss_tflops: float
    intra: float
    inter: float
    gpus_per_node: int
    parameters: float
    waiting: float

    def bandwidth(self, gpus: int) -> float:
        """Bytes a second that a rank sends in a ring: out of a node, its GPUs' links work side by side."""
        if gpus <= self.gpus_per_node:
            return self.intra * 1e9
        return min(self.intra, self.inter * self.gpus_per_node) * 1e9

    def nodes(self, gpus: int) -> int:
        """How many."""
        return -(-gpus // self.gpus_per_node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's parts; they follow each other, nothing overlaps."""

    encoders: float
    loss: float
    loss_traffic: float
    gradients: float
    waiting: float

    @property
    def total(self) -> float:
        """The step."""
        return self.encoders + self.loss + self.loss_traffic + self.gradients + self.waiting

    @property
    def loss_share(self) -> float:
        """Of the loss, its traffic included; waiting stretches all parts alike."""
        return (self.loss + self.loss_traffic) / (self.total - self.waiting)


def step_time(shape: Shape, cluster: Cluster, cost: LossCost) -> StepTime:
    """How long a step takes."""
    bandwidth = cluster.bandwidth(shape.gpus)
    parts = (
        shape.rows / cluster.samples_per_second,
        cost.flops / (cluster.loss_tflops * 1e12),
        cost.sent / bandwidth,
        2 * shape.others * cluster.parameters * FP32 / bandwidth,
    )
    return StepTime(*parts, cluster.waiting * math.log2(cluster.nodes(shape.gpus)) * sum(parts))
