"""``python -m benchmarks.gradient_caching``: what a batch in parts costs and saves, against one graph over the whole batch.

A small image tower and a small text tower of open_clip, random weights, the pairwise CLIP loss, forward and backward. One
thread, CPU time, the median of interleaved runs in one process; memory is the growth of the peak in a fresh process whose
allocator gives large blocks back at once. Prints the table, writes ``gradient_caching.json``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.measure import Row, Step, compare, comparison_parser, interleaved, peak_growth
from mmrep.encoders import OpenClipImageEncoder, OpenClipTextEncoder
from mmrep.encoders.activation_checkpointing import checkpoint_activations
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.modules.gradient_caching import GradientCaching

RESULT = Path("benchmarks/results/gradient_caching.json")
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 6, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 1000, "layers": 6, "width": 128, "heads": 4},
}
BATCH = 64
WHOLE = "one graph"
CASES: dict[str, tuple[int, int, bool]] = {
    "2 parts": (2, 0, False),
    "4 parts": (4, 0, False),
    "8 parts": (8, 0, False),
    "16 parts": (16, 0, False),
    "8 parts, 4 kept": (8, 4, False),
    "blocks again": (1, 0, True),
    "8 parts, blocks again": (8, 0, True),
}
"""Parts of the batch, parts that are kept, whether the towers' blocks are checkpointed."""
TIME_GATES = {"8 parts": 1.5}
MEMORY_GATES = {"8 parts": 0.35}


def training(parts: int, kept: int = 0, blocks: bool = False) -> Callable[[int], None]:
    """Towers, and what runs them forward and backward on so many samples."""
    torch.manual_seed(0)
    encoders = {
        "image": OpenClipImageEncoder(64, ARCHITECTURE, projection=False),
        "text": OpenClipTextEncoder(64, ARCHITECTURE, projection=False),
    }
    if blocks:
        for encoder in encoders.values():
            checkpoint_activations(encoder)
    model = MultimodalModel(encoders, PairwiseCLIPLoss())
    run = GradientCaching(BATCH // parts, kept) if parts > 1 else None
    pictures = torch.randint(0, 256, (BATCH, 3, 64, 64), dtype=torch.uint8)
    texts = torch.randint(1, 1000, (BATCH, 32))

    def forward_and_backward(samples: int) -> None:
        model.zero_grad(set_to_none=False)  # gradients take the same memory in all cases, and stay
        model.loss(model({"image": pictures[:samples], "text": texts[:samples]}, run)).loss.backward()

    return forward_and_backward


def step(name: str) -> Step:
    """A step of a case, or of the whole batch in one graph."""
    return partial(training(*CASES.get(name, (1, 0, False))), BATCH)


def rows(name: str, rounds: int) -> list[Row]:
    ours, theirs = interleaved([step(name), step(WHOLE)], rounds)
    found = [Row.of(name, "CPU s", ours, theirs, WHOLE, TIME_GATES.get(name))]
    ours, theirs = (_in_fresh_process(case) / 2**20 for case in (name, WHOLE))
    return [*found, Row.of(name, "peak MiB", ours, theirs, WHOLE, MEMORY_GATES.get(name))]


@cache
def _in_fresh_process(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.gradient_caching", "--memory-of", name]
    # Memory that was freed would stay with the process where the C library grows its idea of what is large.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(found.stdout.split()[-1])


def memory_of(name: str) -> int:
    """Bytes beyond weights, gradients and inputs, in this process."""
    run = training(*CASES.get(name, (1, 0, False)))
    return peak_growth(partial(run, 2), partial(run, BATCH))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = comparison_parser(__doc__, RESULT, rounds=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory_of:
        print(memory_of(options.memory_of))
        return 0
    measurements: dict[str, Callable[[], list[Row]]] = {name: partial(rows, name, options.rounds) for name in CASES}
    packages = ("torch", "open_clip_torch", "mmrep")
    compare("A batch in parts, forward and backward", measurements, parser, options, RESULT, packages)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
