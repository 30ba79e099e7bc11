"""``python -m benchmarks.scaling``: a training step from 1 to 1,024 GPUs on paper, for each loss, with your own numbers.

The model is `benchmarks.scaling_model`; what it rests on, and what it leaves out, is said in ``benchmarks/scaling.md``, whose
tables are what ``--markdown`` prints.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import NoReturn

from benchmarks.scaling_model import LOSSES
from benchmarks.scaling_rows import (
    BYTES_PER_SAMPLE,
    H100_MFU,
    H100_TFLOPS,
    INFINIBAND_GBPS,
    LOSS_TFLOPS,
    NVLINK_GBPS,
    Numbers,
    row,
)
from benchmarks.scaling_tables import PLOT, RESULT, page_tables, show, write_results


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


if __name__ == "__main__":
    raise SystemExit(main())
