"""``make bench``: time, memory and traffic of the losses, forward and backward, beside the packages that publish them.

One thread, CPU time, the median of interleaved runs in one process; memory is the growth of the peak in a fresh process. The
floor is the time of the matrix products alone that the formula needs. Prints the table, writes ``losses.json``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, Step, compare, comparison_parser, interleaved, peak_growth
from benchmarks.traffic import bytes_sent
from mmrep.losses import ClusterSwapLoss, Loss, PairwiseCLIPLoss, SymileLoss
from mmrep.ops import paths
from mmrep.ops.product_logsumexp import product_logsumexp
from mmrep.ops.sinkhorn import sinkhorn

SCALE = 14.3
RESULT = Path("benchmarks/results/losses.json")


def rows(count: int, n: int, d: int) -> list[Tensor]:
    """Unit rows with gradients."""
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(n, d, generator=generator), dim=1).requires_grad_() for _ in range(count)]


@contextmanager
def insist(path: str | None) -> Iterator[None]:
    """Let all kernels go one way; None: as they choose."""
    limits = {"tiled": (-1, -1), "cached": (-1, 2**60), None: (paths.DENSE_ENTRIES, paths.CACHE_BYTES)}[path]
    with patch.multiple(paths, DENSE_ENTRIES=limits[0], CACHE_BYTES=limits[1]):
        yield


def step(inputs: Sequence[Tensor], loss: Callable[[], Tensor]) -> Step:
    """Forward and backward, from cleared gradients."""

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        loss().backward()

    return run


def of_loss(loss: Loss, inputs: Sequence[Tensor], path: str | None = None) -> Step:
    """A step of one of mmrep's losses."""
    named = {f"m{number}": tensor for number, tensor in enumerate(inputs)}

    def run() -> Tensor:
        found: Tensor = loss(named).loss
        return found

    inner = step([*inputs, *loss.parameters()], run)

    def forced() -> None:
        with insist(path):
            inner()

    return forced


def floor(products: int, left: int, columns: int, d: int, blocks: int = 1) -> Step:
    """So many products of ``[left, D] x [D, columns]``, or of that shape's gradients, ``blocks`` times."""
    a, b, g = torch.randn(left, d), torch.randn(columns, d), torch.randn(left, columns)
    kinds = [lambda: a @ b.T] * (products - 2) + [lambda: g @ b, lambda: g.T @ a]

    def run() -> None:
        for _ in range(blocks):
            for product in kinds:
                product()

    return run


@dataclass(frozen=True)
class Case:
    """What is compared: how to make our step and theirs."""

    ours: Callable[[], Step]
    theirs: Callable[[], Step]
    theirs_is: str


def clip(n: int, d: int, path: str | None = None) -> Step:
    return of_loss(PairwiseCLIPLoss(init_temperature=1 / SCALE), rows(2, n, d), path)


def open_clip(n: int, d: int) -> Step:
    from open_clip.loss import ClipLoss

    (x, y), loss, scale = rows(2, n, d), ClipLoss(), torch.tensor(SCALE, requires_grad=True)
    return step([x, y, scale], lambda: loss(x, y, scale))


def siglip(n: int, d: int) -> Step:
    return of_loss(PairwiseCLIPLoss(form="sigmoid"), rows(2, n, d))


def open_siglip(n: int, d: int) -> Step:
    from open_clip.loss import SigLipLoss

    (x, y), loss = rows(2, n, d), SigLipLoss()
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    return step([x, y, scale, bias], lambda: loss(x, y, scale, bias))


def clip_of_rank(n: int, total: int, d: int) -> Step:
    """One rank's work: its rows of one modality, all rows of the other."""
    x, y, scale = *rows(1, n, d), *rows(1, total, d), torch.tensor(SCALE, requires_grad=True)

    def loss() -> Tensor:
        mine, columns, positives = product_logsumexp(x, y, scale)
        return ((mine - positives) + (columns[:n] - positives)).sum() / (2 * n)

    return step([x, y, scale], loss)


def open_clip_of_rank(n: int, total: int, d: int) -> Step:
    """open_clip's local loss, after its gather: two blocks of logits."""
    (x, y), (all_x, all_y) = rows(2, n, d), rows(2, total, d)
    scale, labels = torch.tensor(SCALE, requires_grad=True), torch.arange(n)

    def loss() -> Tensor:
        image, text = scale * x @ all_y.T, scale * y @ all_x.T
        return (F.cross_entropy(image, labels) + F.cross_entropy(text, labels)) / 2

    return step([x, y, all_x, all_y, scale], loss)


def symile(negatives: str, m: int, n: int, d: int, path: str | None = None) -> Step:
    return of_loss(SymileLoss(negatives=negatives), rows(m, n, d), path)  # at the scale that it finds for itself


def symile_package(sampling: str, m: int, n: int, d: int) -> Step:
    from symile import Symile

    inputs, loss = rows(m, n, d), Symile(sampling)
    scale = torch.tensor(3.0 * d ** ((m - 1) / 2), requires_grad=True)
    return step([*inputs, scale], lambda: loss(inputs, scale))


def codes(n: int, k: int) -> Step:
    scores, valid = _scores(n, k)[None], torch.ones(1, n, dtype=torch.bool)
    return lambda: sinkhorn(scores, valid, epsilon=0.05, iterations=3)


def codes_of_swav(n: int, k: int) -> Step:
    """As published: one matrix that is divided by its sums again and again (Caron et al. 2020, appendix A)."""
    scores = _scores(n, k)

    def run() -> Tensor:
        matrix = (scores / 0.05).exp().T
        matrix /= matrix.sum()
        for _ in range(3):
            matrix /= matrix.sum(dim=1, keepdim=True)
            matrix /= k
            matrix /= matrix.sum(dim=0, keepdim=True)
            matrix /= n
        return (matrix * n).T

    return run


def _scores(n: int, k: int) -> Tensor:
    (z,), (prototypes,) = rows(1, n, 128), rows(1, k, 128)
    return (z @ prototypes.T).detach()


def swav(n: int, views: int, k: int, d: int) -> Step:
    loss = ClusterSwapLoss(modalities=["m0"], embed_dim=d, num_prototypes=k, teacher_views=2)
    return of_loss(loss, [torch.stack(rows(views, n, d), dim=1).detach().requires_grad_()])


def swav_of_lightly(n: int, views: int, k: int, d: int) -> Step:
    from lightly.loss import SwaVLoss

    inputs, (prototypes,), loss = rows(views, n, d), rows(1, k, d), SwaVLoss()

    def run() -> Tensor:
        scores = [view @ prototypes.T for view in inputs]
        found: Tensor = loss(scores[:2], scores[2:])
        return found

    return step([*inputs, prototypes], run)


OPEN_CLIP, PACKAGE = "open_clip", "symile package"
FLOOR3, FLOOR4 = "3 matrix products", "4 matrix products"
CASES = {
    "CLIP N=4096 D=512, tiled": Case(lambda: clip(4096, 512, "tiled"), lambda: open_clip(4096, 512), OPEN_CLIP),
    "CLIP N=4096 D=512, cached": Case(lambda: clip(4096, 512, "cached"), lambda: open_clip(4096, 512), OPEN_CLIP),
    "CLIP N=4096 D=512, tiled, floor": Case(
        lambda: clip(4096, 512, "tiled"), lambda: floor(4, 4096, 4096, 512), FLOOR4
    ),
    "CLIP N=4096 D=512, cached, floor": Case(
        lambda: clip(4096, 512, "cached"), lambda: floor(3, 4096, 4096, 512), FLOOR3
    ),
    "CLIP N=16384 D=512": Case(lambda: clip(16384, 512), lambda: open_clip(16384, 512), OPEN_CLIP),
    "CLIP of a rank, n=1024 N=8192 D=512": Case(
        lambda: clip_of_rank(1024, 8192, 512), lambda: open_clip_of_rank(1024, 8192, 512), "open_clip, local loss"
    ),
    "CLIP N=128 D=512": Case(lambda: clip(128, 512), lambda: open_clip(128, 512), OPEN_CLIP),
    "SigLIP N=4096 D=512": Case(lambda: siglip(4096, 512), lambda: open_siglip(4096, 512), OPEN_CLIP),
    "Symile all, M=3 N=256 D=512, tiled": Case(
        lambda: symile("all", 3, 256, 512, "tiled"), lambda: symile_package("n_squared", 3, 256, 512), PACKAGE
    ),
    "Symile all, M=3 N=256 D=512, cached": Case(
        lambda: symile("all", 3, 256, 512, "cached"), lambda: symile_package("n_squared", 3, 256, 512), PACKAGE
    ),
    "Symile all, M=3 N=256 D=512, tiled, floor": Case(
        lambda: symile("all", 3, 256, 512, "tiled"), lambda: floor(4, 256, 256, 512, blocks=256), FLOOR4
    ),
    "Symile all, M=3 N=512 D=256": Case(
        lambda: symile("all", 3, 512, 256), lambda: symile_package("n_squared", 3, 512, 256), PACKAGE
    ),
    "Symile all, M=3 N=512 D=256, floor": Case(
        lambda: symile("all", 3, 512, 256), lambda: floor(4, 512, 512, 256, blocks=512), FLOOR4
    ),
    "Symile all, M=4 N=48 D=128": Case(
        lambda: symile("all", 4, 48, 128), lambda: symile_package("n_squared", 4, 48, 128), PACKAGE
    ),
    "Symile shuffled, M=3 N=4096 D=512": Case(
        lambda: symile("shuffled", 3, 4096, 512), lambda: symile_package("n", 3, 4096, 512), PACKAGE
    ),
    "Symile shuffled, M=3 N=4096 D=512, floor": Case(
        lambda: symile("shuffled", 3, 4096, 512), lambda: floor(3, 4096, 4096, 512, blocks=3), "9 matrix products"
    ),
    "Sinkhorn B=2048 K=3000": Case(lambda: codes(2048, 3000), lambda: codes_of_swav(2048, 3000), "swav's form"),
    "SwAV B=256, 6 views, K=3000 D=128": Case(
        lambda: swav(256, 6, 3000, 128), lambda: swav_of_lightly(256, 6, 3000, 128), "lightly"
    ),
}
Limits = tuple[float | None, float | None]
TIMES: dict[str, Limits] = {
    "CLIP N=4096 D=512, tiled": (0.62, 0.54),
    "CLIP N=4096 D=512, cached": (0.48, 0.38),
    "CLIP N=4096 D=512, tiled, floor": (1.20, 1.05),
    "CLIP N=4096 D=512, cached, floor": (1.30, 1.10),
    "CLIP of a rank, n=1024 N=8192 D=512": (0.60, 0.36),
    "CLIP N=128 D=512": (None, None),
    "SigLIP N=4096 D=512": (None, None),
    "Symile all, M=3 N=256 D=512, tiled": (1 / 3.8, None),
    "Symile all, M=3 N=256 D=512, cached": (1 / 3.8, None),
    "Symile all, M=3 N=256 D=512, tiled, floor": (None, 1.0),
    "Symile all, M=3 N=512 D=256": (1 / 4.5, 1 / 5.7),
    "Symile all, M=3 N=512 D=256, floor": (None, 1.0),
    "Symile all, M=4 N=48 D=128": (1 / 8, 1 / 12),
    "Symile shuffled, M=3 N=4096 D=512": (0.6, 0.5),
    "Symile shuffled, M=3 N=4096 D=512, floor": (None, 1.0),
    "Sinkhorn B=2048 K=3000": (0.65, 0.45),
    "SwAV B=256, 6 views, K=3000 D=128": (None, None),
}
"""Gate and aim of ours over theirs, CPU seconds."""

MEMORY: dict[str, Limits] = {
    "CLIP N=16384 D=512": (1 / 20, 1 / 30),
    "Symile all, M=3 N=256 D=512, tiled": (1 / 50, None),
    "Symile all, M=3 N=512 D=256": (1 / 200, None),
    "Symile shuffled, M=3 N=4096 D=512": (1 / 3, None),
}
"""Gate and aim of ours over theirs, growth of the peak."""


def time_rows(name: str, rounds: int) -> list[Row]:
    case = CASES[name]
    ours, theirs = interleaved([case.ours(), case.theirs()], rounds)
    return [Row.of(name, "CPU s", ours, theirs, case.theirs_is, *TIMES[name])]


def memory_rows(name: str) -> list[Row]:
    ours, theirs = (_in_fresh_process(name, side) / 2**20 for side in ("ours", "theirs"))
    return [Row.of(name, "peak MiB", ours, theirs, CASES[name].theirs_is, *MEMORY[name])]


def _in_fresh_process(name: str, side: str) -> int:
    command = [sys.executable, "-m", "benchmarks.losses", "--memory-of", name, "--side", side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory_of(name: str, side: str) -> int:
    """Bytes, in this process."""
    case = CASES[name]
    return peak_growth(clip(300, 8, "tiled"), case.ours() if side == "ours" else case.theirs())


def traffic_rows() -> list[Row]:
    """The second row is what the aim counts: rows that travel in bf16 with gradients in fp32, against all in fp32."""
    found = []
    limits: Limits
    for ours, theirs, limits in (
        (torch.float32, torch.float32, (0.50, 0.375)),
        (torch.bfloat16, torch.float32, (0.50, 0.375)),
        (torch.bfloat16, torch.bfloat16, (None, None)),
    ):
        name = f"CLIP on 4 ranks, D=512, rows of {_short(ours)}"
        figures = bytes_sent("ours", ours) / 2**20, bytes_sent("theirs", theirs) / 2**20
        found.append(
            Row.of(name, "MiB a rank sends", *figures, f"open_clip, gather with grad, {_short(theirs)}", *limits)
        )
    return found


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = comparison_parser(__doc__, RESULT, rounds=7)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory_of:
        print(memory_of(options.memory_of, options.side))
        return 0
    measurements: dict[str, Callable[[], list[Row]]] = {
        **{name: partial(time_rows, name, options.rounds) for name in TIMES},
        **{f"{name}, memory": partial(memory_rows, name) for name in MEMORY},
        "traffic": traffic_rows,
    }
    packages = ("torch", "open_clip_torch", "symile", "lightly", "mmrep")
    compare("Losses, forward and backward", measurements, parser, options, RESULT, packages)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
