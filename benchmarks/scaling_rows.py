"""The steps of the scaling model: the numbers that go in, the rows that come out, and published ones beside them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.scaling_model import LOSSES, Cluster, LossCost, Shape, StepTime, pairwise, step_time

STREAMING = Path("benchmarks/results/streaming.json")
GPUS = [2**power for power in range(11)]
BATCHES = [2**power for power in range(10, 18)]
MODALITIES = {"symile-shuffled": 3, "symile-all": 3, "gram": 3, "triangle": 3, "confu": 3}
"""Of the losses that want more than two."""
VIEWS = {"modality-pairwise": 2}
H100_TFLOPS, H100_MFU = 989.4, 0.206
LOSS_TFLOPS = 40.0
NVLINK_GBPS, INFINIBAND_GBPS = 3600.0, 400.0
WAITING = 0.0126
"""Fitted to `NEMO`: see `calibration`."""
GFLOPS, MORE_GFLOPS = 14.78, 8.82
PARAMETERS, MORE_PARAMETERS = 151.28e6, 87.85e6
"""Of ViT-B/32 with its text tower, and of one more tower like its picture tower."""
BYTES_PER_SAMPLE = 25_000.0
NEMO_GFLOPS, NEMO_PARAMETERS, NEMO_ROWS, NEMO_WIDTH = 581.15, 1366.68e6, 80, 1024


@dataclass(frozen=True)
class Published:
    """Samples a second that NVIDIA publishes of CLIP g/14 in NeMo on 1, 2, 4, 8 and 16 nodes of 8 GPUs."""

    gpu: str
    samples: tuple[float, ...]
    intra: float
    inter: float
    fp32_tflops: float


NEMO = (
    Published("A100", (559, 1115, 2190, 4407, 8633), 300.0, 25.0, 19.5),
    Published("H100", (935, 1795, 3502, 6771, 13829), 450.0, 50.0, 66.9),
)


@dataclass(frozen=True)
class Row:
    """A step of one loss on so many GPUs."""

    loss: str
    shape: Shape
    cost: LossCost
    time: StepTime
    nodes: int
    bytes_per_sample: float
    reader_seconds: float

    @property
    def samples_per_second(self) -> float:
        """Of all GPUs."""
        return self.shape.batch / self.time.total

    @property
    def reader_rate(self) -> float:
        """Bytes a second that a node reads."""
        return self.samples_per_second / self.nodes * self.bytes_per_sample

    @property
    def reader_cores(self) -> float:
        """Cores of a node that read, decode and resize all the time."""
        return self.samples_per_second / self.nodes * self.reader_seconds


@dataclass(frozen=True)
class Numbers:
    """What the user says; None: the default of the loss.

    Attributes:
        tflops, mfu: Peak of a GPU, 10^12 a second, and the share that encoders reach.
        rate: Samples a second and GPU through the encoders, instead.
        loss_tflops, intra, inter, gpus_per_node, waiting: See `Cluster`; bandwidths in 10^9 bits a second.
        width, modalities: See `Shape`.
        gflops: Of a sample's forward pass through all encoders, 10^9.
        parameters: Of the model.
        bytes_per_sample: As stored.
    """

    tflops: float = H100_TFLOPS
    mfu: float = H100_MFU
    rate: float | None = None
    loss_tflops: float = LOSS_TFLOPS
    intra: float = NVLINK_GBPS
    inter: float = INFINIBAND_GBPS
    gpus_per_node: int = 8
    waiting: float = WAITING
    width: int = 512
    modalities: int | None = None
    gflops: float | None = None
    parameters: float | None = None
    bytes_per_sample: float = BYTES_PER_SAMPLE

    def of(self, loss: str, modalities: int | None = None) -> tuple[Shape, Cluster]:
        """Shape (of one sample on one GPU) and cluster of a loss."""
        m = modalities or self.modalities or MODALITIES.get(loss, 2)
        gflops = self.gflops or GFLOPS + (m - 2) * MORE_GFLOPS
        rate = self.rate or self.tflops * self.mfu * 1e3 / (3 * gflops)  # backward costs twice forward
        views = VIEWS.get(loss, 1)
        parameters = self.parameters or PARAMETERS + (m - 2) * MORE_PARAMETERS
        links = self.intra / 8, self.inter / 8
        cluster = Cluster(rate / views, self.loss_tflops, *links, self.gpus_per_node, parameters, self.waiting)
        return Shape(1, 1, self.width, m, views), cluster


CASES: tuple[tuple[str, int | None], ...] = (("pairwise", 2), ("pairwise", 3), *((n, None) for n in list(LOSSES)[1:]))
"""The tables of the page: losses and modalities."""


def row(loss: str, gpus: int, batch: int, numbers: Numbers, modalities: int | None = None) -> Row:
    """One step."""
    one, cluster = numbers.of(loss, modalities)
    shape = replace(one, gpus=gpus, batch=batch)
    cost = LOSSES[loss](shape)
    time = step_time(shape, cluster, cost)
    return Row(loss, shape, cost, time, cluster.nodes(gpus), numbers.bytes_per_sample, reader_seconds())


@cache
def reader_seconds() -> float:
    """CPU seconds a sample of the data layer, as measured on pictures of 320 to 512 pixels."""
    rows = json.loads((Path(__file__).parents[1] / STREAMING).read_text())["rows"]
    found: float = next(r["ours"] for r in rows if r["case"] == "320-512 px, at Pillow parity") / 1000
    return found


def speedups(published: Published, waiting: float) -> list[float]:
    """The model's, on 1 to 16 nodes against one, where its encoders take what one published node leaves them."""
    free = Cluster(1.0, published.fp32_tflops * 0.6, published.intra, published.inter, 8, NEMO_PARAMETERS, waiting)
    steps = []
    for power in range(len(published.samples)):
        shape = Shape(8 * 2**power, NEMO_ROWS * 8 * 2**power, NEMO_WIDTH)
        parts = step_time(shape, replace(free, samples_per_second=math.inf), pairwise(shape))
        steps.append((parts.total - parts.waiting, 1 + waiting * power))
    encoders = NEMO_ROWS * 8 / published.samples[0] - steps[0][0]
    whole = [(encoders + rest) * longer for rest, longer in steps]
    return [2**power * whole[0] / seconds for power, seconds in enumerate(whole)]


def calibration() -> list[tuple[str, int, float, float]]:
    """GPU, nodes, published and modelled speed-up."""
    return [
        (found.gpu, 2**power, found.samples[power] / found.samples[0], ours)
        for found in NEMO
        for power, ours in enumerate(speedups(found, WAITING))
        if power
    ]
