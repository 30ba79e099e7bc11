"""``make bench-retrieval``: CPU time and peak memory of retrieval beside CLIP_benchmark 1.6.2, on the same features.

Texts and pictures of 512 numbers, one caption a picture, recall@1, 5 and 10 in both directions. Theirs is what
``clip_benchmark.metrics.zeroshot_retrieval.evaluate`` does once it has its features, by its own functions: the matrix of all
scores and the matrix of positive pairs, then `recall_at_k` in batches of 64. Each run has a process of its own: CPU time on
one thread, and the growth of the peak of memory. The figures of both sides must be equal. Prints the table, writes
``retrieval.json``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.clip_benchmark_peer import VERSION, overlay
from benchmarks.measure import Row, compare, comparison_parser, peak_growth
from mmrep.evaluation.clip_benchmark_json import clip_benchmark_json
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.retrieval import retrieve
from mmrep.losses import PairwiseCLIPLoss

RESULT = Path("benchmarks/results/retrieval.json")
WIDTH, SMALL, LARGE = 512, 20_000, 100_000
KS = (1, 5, 10)
BATCH = 64
"""CLIP_benchmark's default batch."""
PEER = f"CLIP_benchmark {VERSION}"
MEMORY_BOUND, TIME_BOUND = 1024.0, 900.0
"""MiB and CPU seconds that 100 k x 100 k may take."""


def features(n: int) -> tuple[Tensor, Tensor]:
    """Unit rows of pictures and of their captions, which are near enough for some to be found."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)
    texts = F.normalize(images + 5.5 / WIDTH**0.5 * torch.randn(n, WIDTH, generator=generator), dim=1)
    return images, texts


@torch.inference_mode()
def ours(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Both directions by `retrieve`, under their names."""
    everyone = torch.ones(len(images), dtype=torch.bool)
    embeddings = Embeddings({"image": images, "text": texts}, {"image": everyone, "text": everyone}, {})
    figures = retrieve(embeddings, PairwiseCLIPLoss())
    result = {"task": "retrieval", "data": "", "checkpoint": "", "directions": figures}
    metrics: dict[str, float] = clip_benchmark_json(result)["metrics"]
    return metrics


def theirs(images: Tensor, texts: Tensor) -> dict[str, float]:
    """What follows the features in their `evaluate`, statement by statement, on their own functions."""
    peer = _peer()
    scores = texts @ images.t()
    positive_pairs = torch.zeros_like(scores, dtype=torch.bool)
    positive_pairs[torch.arange(len(scores)), torch.arange(len(images))] = True
    metrics = {}
    for k in KS:
        found = peer.batchify(peer.recall_at_k, scores, positive_pairs, BATCH, "cpu", k=k)
        metrics[f"image_retrieval_recall@{k}"] = (found > 0).float().mean().item()
        found = peer.batchify(peer.recall_at_k, scores.T, positive_pairs.T, BATCH, "cpu", k=k)
        metrics[f"text_retrieval_recall@{k}"] = (found > 0).float().mean().item()
    return metrics


def _peer() -> Any:
    """Their module, with our NumPy: it uses none."""
    if (path := str(overlay())) not in sys.path:
        sys.path.append(path)
    return importlib.import_module("clip_benchmark.metrics.zeroshot_retrieval")


SIDES: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {"ours": ours, "theirs": theirs}


@dataclass(frozen=True)
class Run:
    """CPU seconds, MiB by which the peak of a fresh process was raised, and the figures."""

    seconds: float
    memory: float
    metrics: dict[str, float]


def measure(side: str, n: int) -> Run:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.retrieval", "--measure", side, str(n)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Run(**json.loads(printed.splitlines()[-1]))


def measure_here(side: str, n: int) -> Run:
    """One run in this process, which has done nothing else."""
    images, texts = features(n)
    metrics: dict[str, float] = {}
    seconds = 0.0

    def step() -> None:
        nonlocal seconds
        start = time.process_time()
        metrics.update(SIDES[side](images, texts))
        seconds = time.process_time() - start

    memory = peak_growth(lambda: SIDES[side](*features(256)), step) / 2**20
    return Run(seconds, memory, metrics)


def small_rows(rounds: int) -> list[Row]:
    """Beside CLIP_benchmark, in turn; of each side the median run.

    Raises:
        RuntimeError: If the figures of the two differ.
    """
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, found in runs.items():
            found.append(measure(side, SMALL))
    if runs["ours"][0].metrics != runs["theirs"][0].metrics:
        raise RuntimeError(f"the figures differ: {runs['ours'][0].metrics} and {runs['theirs'][0].metrics}")
    seconds = [statistics.median(run.seconds for run in runs[side]) for side in SIDES]
    memory = [statistics.median(run.memory for run in runs[side]) for side in SIDES]
    case = f"{SMALL:,} pictures and captions, both directions"
    return [
        Row.of(case, "CPU s", seconds[0], seconds[1], PEER, 0.5, 0.2),
        Row.of(case, "MiB at the peak", memory[0], memory[1], PEER, 0.05, 0.02),
    ]


def large_rows(rounds: int) -> list[Row]:
    """What only fits because ranks are counted: the matrix of all scores alone would be 37 GiB."""
    run = measure("ours", LARGE)
    case, matrix = f"{LARGE:,} pictures and captions, both directions", 4 * LARGE**2 / 2**20
    return [
        Row.of(case, "CPU s", run.seconds, TIME_BOUND, "bound", 1.0),
        Row.of(case, "MiB at the peak", run.memory, MEMORY_BOUND, "bound", 1.0),
        Row.of(case, "MiB at the peak", run.memory, matrix, "the scores alone"),
    ]


CASES: dict[str, Callable[[int], list[Row]]] = {"20 k": small_rows, "100 k": large_rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = comparison_parser(__doc__, RESULT, rounds=1)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.measure:
        print(json.dumps(asdict(measure_here(options.measure[0], int(options.measure[1])))))
        return 0
    measurements = {name: partial(run, options.rounds) for name, run in CASES.items()}
    compare("Retrieval", measurements, parser, options, RESULT, ("torch", "numpy", "mmrep"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
