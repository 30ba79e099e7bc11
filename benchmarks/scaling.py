"""``python -m benchmarks.scaling``: a training step from 1 to 1,024 GPUs on paper, for each loss, with your own numbers.

The model is `benchmarks.scaling_model`; what it rests on, and what it leaves out, is said in ``benchmarks/scaling.md``, whose
tables are what ``--markdown`` prints.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.scaling_model import LOSSES, Cluster, LossCost, Shape, StepTime, pairwise, step_time

RESULT, PLOT = Path("benchmarks/results/scaling.json"), Path("benchmarks/results/scaling.png")
STREAMING = Path("benchmarks/results/streaming.json")
GPUS = [2**power for power in range(11)]
BATCHES = [2**power for power in range(10, 18)]
TABLE_GPUS, TABLE_BATCHES = [1, 8, 64, 256, 1024], [1024, 8192, 32768, 131072]
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


Column = tuple[str, Callable[[Row], str]]
COLUMNS: tuple[Column, ...] = (
    ("batch", lambda r: f"{r.shape.batch:,}"),
    ("GPUs", lambda r: f"{r.shape.gpus:,}"),
    ("encoders ms", lambda r: _figure(1e3 * r.time.encoders)),
    ("loss ms", lambda r: _figure(1e3 * r.time.loss)),
    ("loss sends MB", lambda r: _figure(r.cost.sent / 1e6)),
    ("its ms", lambda r: _figure(1e3 * r.time.loss_traffic)),
    ("gradients ms", lambda r: _figure(1e3 * r.time.gradients)),
    ("waiting ms", lambda r: _figure(1e3 * r.time.waiting)),
    ("step ms", lambda r: _figure(1e3 * r.time.total)),
    ("samples/s", lambda r: f"{r.samples_per_second:,.0f}"),
    ("loss share", lambda r: f"{r.time.loss_share:.1%}"),
    ("efficiency", lambda r: f"{r.time.encoders / r.time.total:.1%}"),
    ("loss memory MiB", lambda r: f"{r.cost.memory / 2**20:,.0f}"),
    ("reads MB/s a node", lambda r: f"{r.reader_rate / 1e6:,.0f}"),
    ("cores a node", lambda r: f"{r.reader_cores:,.1f}"),
)


def _figure(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def title(loss: str, shape: Shape) -> str:
    """Of a loss's table."""
    views = f", V = {shape.views}" if shape.views > 1 else ""
    return f"{loss}, M = {shape.modalities}{views}, D = {shape.width}"


def cells(rows: Iterable[Row]) -> list[list[str]]:
    """The table's text, line by line."""
    return [[text(r) for _, text in COLUMNS] for r in rows]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)])


def first_above(shares: Iterable[tuple[int, float]], limit: float) -> str:
    """The first size whose share is above a limit."""
    return next((f"{size:,}" for size, share in shares if share > limit), "never")


def limits(numbers: Numbers) -> list[list[str]]:
    """Where each loss takes a tenth, and a half, of the step."""
    found = []
    for loss, m in CASES:
        by_gpus = [(gpus, row(loss, gpus, 32768, numbers, m)) for gpus in GPUS]
        by_batch = [(batch, row(loss, 64, batch, numbers, m)) for batch in BATCHES]
        traffic = [
            (gpus, (r.time.loss_traffic + r.time.gradients) / (r.time.total - r.time.waiting)) for gpus, r in by_gpus
        ]
        last = by_batch[-1][1]
        found.append(
            [title(loss, last.shape).rsplit(", D", 1)[0]]
            + [first_above(((size, r.time.loss_share) for size, r in by_batch), limit) for limit in (0.1, 0.5)]
            + [first_above(((size, r.time.loss_share) for size, r in by_gpus), limit) for limit in (0.1, 0.5)]
            + [first_above(traffic, limit) for limit in (0.1, 0.5)]
            + [f"{last.cost.memory / 2**30:,.1f}"]
        )
    return found


LIMITS_HEAD = (
    "loss",
    "10 %: batch, on 64 GPUs",
    "50 %",
    "10 %: GPUs, batch 32,768",
    "50 %",
    "10 % in traffic: GPUs, batch 32,768",
    "50 %",
    "loss memory GiB, batch 131,072 on 64",
)


def page_tables() -> str:
    """All tables of ``scaling.md``."""
    numbers = Numbers()
    errors = [
        [gpu, str(nodes), f"{published:.2f}", f"{ours:.2f}", f"{100 * (ours - published) / nodes:+.1f}"]
        for gpu, nodes, published, ours in calibration()
    ]
    head = ["NeMo, CLIP g/14", "nodes", "published speed-up", "model", "points of efficiency"]
    parts = ["### Against published scaling", markdown(head, errors)]
    parts += ["### Where each loss stops scaling", markdown(LIMITS_HEAD, limits(numbers))]
    for loss, m in CASES:
        rows = [row(loss, w, n, numbers, m) for n in TABLE_BATCHES for w in TABLE_GPUS if n // w <= 32768]
        parts += [f"### {title(loss, rows[0].shape)}", markdown([name for name, _ in COLUMNS], cells(rows))]
    return "\n\n".join(parts)


class Parser(argparse.ArgumentParser):
    """Answers a wrong value in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def positive(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"'{text}' is no positive number")
    return value


def share(text: str) -> float:
    """A number in (0, 1]."""
    if (value := positive(text)) > 1:
        raise argparse.ArgumentTypeError(f"'{text}' is a share, at most 1")
    return value


def count(text: str) -> int:
    """A positive whole number."""
    if (value := positive(text)) != int(value):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number")
    return int(value)


def counts(text: str) -> list[int]:
    """Several, with commas between them."""
    return [count(part) for part in text.split(",")]


def two(text: str) -> tuple[float, float]:
    """Two numbers, with a comma between them."""
    found = [positive(part) for part in text.split(",")]
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"'{text}': two numbers are wanted, inside a node and out of it, as 3600,400")
    return found[0], found[1]


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="benchmarks.scaling", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--loss", action="append", choices=list(LOSSES), help="several times for several; all where none is named")
    add("--gpus", type=counts, default=[1, 8, 64, 256, 1024], metavar="W,...", help="numbers of GPUs")
    add("--batches", type=counts, default=[1024, 32768], metavar="N,...", help="global batches")
    add(
        "--gpu-tflops", type=positive, default=H100_TFLOPS, help=f"peak of a GPU in 10^12/s ({H100_TFLOPS}: H100, bf16)"
    )
    add("--mfu", type=share, default=H100_MFU, help=f"share of it that encoders reach ({H100_MFU}: NeMo's g/14)")
    add("--samples-per-second-per-gpu", type=positive, help="measured rate of the encoders, instead of the two above")
    add("--gflops-per-sample", type=positive, help="10^9, forward, all encoders (14.78 and 8.82 a further modality)")
    add("--loss-tflops", type=positive, default=LOSS_TFLOPS, help=f"what the loss reaches, 10^12/s ({LOSS_TFLOPS:g})")
    add(
        "--bandwidth-gbps",
        type=two,
        default=(NVLINK_GBPS, INFINIBAND_GBPS),
        metavar="INTRA,INTER",
        help="10^9 bits a second, GPU and direction, inside a node and out of it (3600,400)",
    )
    add("--gpus-per-node", type=count, default=8)
    add("--embed-dim", type=count, default=512)
    add("--modalities", type=count, help="2, or 3 for the losses that want them")
    add("--parameters", type=positive, help="of the model (151.28e6 and 87.85e6 a further modality)")
    add("--bytes-per-sample", type=positive, default=BYTES_PER_SAMPLE, help=f"as stored ({BYTES_PER_SAMPLE:g})")
    add("--markdown", action="store_true", help="the tables of scaling.md, of the default numbers")
    add("--write", action="store_true", help=f"write {RESULT} and {PLOT}, of the default numbers")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.markdown:
        print(page_tables())
        return 0
    if options.write:
        write_results()
        return 0
    losses = _losses(parser, options)
    numbers = Numbers(
        tflops=options.gpu_tflops,
        mfu=options.mfu,
        rate=options.samples_per_second_per_gpu,
        loss_tflops=options.loss_tflops,
        intra=options.bandwidth_gbps[0],
        inter=options.bandwidth_gbps[1],
        gpus_per_node=options.gpus_per_node,
        width=options.embed_dim,
        modalities=options.modalities,
        gflops=options.gflops_per_sample,
        parameters=options.parameters,
        bytes_per_sample=options.bytes_per_sample,
    )
    for loss in losses:
        show([row(loss, gpus, batch, numbers) for batch in options.batches for gpus in options.gpus])
    return 0


def _losses(parser: Parser, options: argparse.Namespace) -> list[str]:
    """Those that were named, or all that take so many modalities."""
    for gpus, batch in ((gpus, batch) for gpus in options.gpus for batch in options.batches):
        if batch % gpus:
            parser.error(f"--batches {batch} is no multiple of --gpus {gpus}: every GPU has equally many samples")
    m = options.modalities
    if m is not None and m < 2:
        parser.error(f"--modalities {m}: at least two are contrasted")
    unfit = {} if m in (None, 3) else {"triangle": "three"} | ({"confu": "at least three"} if m < 3 else {})
    for loss in options.loss or ():
        if loss in unfit:
            parser.error(f"--modalities {m}: {loss} wants {unfit[loss]}")
    return options.loss or [loss for loss in LOSSES if loss not in unfit]


def show(rows: Sequence[Row]) -> None:
    """Print one loss's table, aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title(rows[0].loss, rows[0].shape), title_justify="left")
    for name, _ in COLUMNS:
        table.add_column(name, justify="right")
    for line in cells(rows):
        table.add_row(*line)
    Console(width=max(100, Console().width if Console().is_terminal else 190)).print(table)


def write_results() -> None:
    """The default numbers' JSON and plot."""
    numbers = Numbers()
    rows = [row(loss, w, n, numbers, m) for loss, m in CASES for n in BATCHES for w in GPUS if n % w == 0]
    result: dict[str, Any] = {
        "inputs": {**asdict(numbers), "reader_seconds_a_sample": reader_seconds()},
        "calibration": [
            dict(zip(("gpu", "nodes", "published", "model"), found, strict=True)) for found in calibration()
        ],
        "rows": [
            {
                "loss": r.loss,
                "modalities": r.shape.modalities,
                "views": r.shape.views,
                "gpus": r.shape.gpus,
                "batch": r.shape.batch,
                **{f"{name}_s": value for name, value in asdict(r.time).items()},
                **{f"loss_{name}": value for name, value in asdict(r.cost).items()},
            }
            for r in rows
        ],
    }
    RESULT.write_text(json.dumps(result) + "\n")
    plot(numbers)


def plot(numbers: Numbers) -> None:
    """The loss's share by batch and by GPUs, and what is left of the encoders' speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    by_batch, by_gpus, efficiency = figure.subplots(1, 3)
    for loss, m in CASES:
        label = f"{loss}, M = {numbers.of(loss, m)[0].modalities}"
        shares = [100 * row(loss, 64, batch, numbers, m).time.loss_share for batch in BATCHES]
        by_batch.plot(BATCHES, shares, marker="o", markersize=3, linewidth=1.2)
        over = [row(loss, gpus, 32768, numbers, m) for gpus in GPUS]
        by_gpus.plot(GPUS, [100 * r.time.loss_share for r in over], marker="o", markersize=3, linewidth=1.2)
        kept = [100 * r.time.encoders / r.time.total for r in over]
        efficiency.plot(GPUS, kept, marker="o", markersize=3, linewidth=1.2, label=label)
    names = (
        "loss, % of the step: 64 GPUs",
        "loss, % of the step: batch 32,768",
        "encoders, % of the step: batch 32,768",
    )
    for axes, name in zip((by_batch, by_gpus, efficiency), names, strict=True):
        axes.set_xscale("log", base=2)
        if axes is efficiency:
            axes.set_ylim(0, 101)
        else:
            axes.set_yscale("log")
            axes.set_ylim(0.05, 130)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.set_xlabel("global batch" if axes is by_batch else "GPUs", fontsize=9)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
