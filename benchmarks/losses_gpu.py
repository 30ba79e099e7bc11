"""``python -m benchmarks.losses_gpu``: the kernels on a GPU, beside open_clip's loss and figures that Inf-CL published.

CLIP of N = 32,768 rows, D = 512, bf16: TFLOP/s counting 8 N^2 D (four matrix products), and the memory beyond inputs. Symile
with all negatives, N = 2,048, D = 512. Times by CUDA events, medians. Prints a table, writes ``losses_gpu.json``.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["MMREP_TRITON"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, Step, show, write
from mmrep.losses import SymileLoss
from mmrep.ops.product_logsumexp import product_logsumexp

RESULT = Path("benchmarks/results/losses_gpu.json")
N, D, SYMILE_N, ROUNDS = 32_768, 512, 2048, 9
INF_CL_MIB = 0.18 * 1024
"""Published loss memory at a batch of 32k on 8 A800 (Cheng et al. 2024, its repository's table); open_clip there: 2.27 GB."""


def rows(count: int, n: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit rows on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = [torch.randn(n, D, device="cuda", generator=generator) for _ in range(count)]
    return [F.normalize(side, dim=1).to(dtype).requires_grad_() for side in made]


def measure(step: Step) -> tuple[float, float]:
    """Median milliseconds, and peak MiB beyond what was there before."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 2**20


def step(inputs: list[Tensor], loss: Callable[[], Tensor]) -> Step:
    """Forward and backward."""
    return lambda: torch.autograd.grad(loss(), inputs)


def clip(path: str) -> Step:
    x, y = rows(2, N, torch.bfloat16)
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)

    def loss() -> Tensor:
        mine, columns, positives = product_logsumexp(x, y, scale, path=path)
        return ((mine - positives) + (columns - positives)).mean() / 2

    return step([x, y, scale], loss)


def open_clip() -> Step:
    from open_clip.loss import ClipLoss

    (x, y), theirs = rows(2, N, torch.bfloat16), ClipLoss()
    scale = torch.tensor(20.0, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return step([x, y, scale], lambda: theirs(x, y, scale))


def symile() -> Step:
    inputs, loss = rows(3, SYMILE_N, torch.float32), SymileLoss(negatives="all").cuda()
    named = {f"m{number}": side for number, side in enumerate(inputs)}

    def run() -> Tensor:
        found: Tensor = loss(named).loss
        return found

    return step(inputs, run)


def main() -> int:
    """Run it."""
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured", file=sys.stderr)
        return 2
    peer_ms, peer_mib = measure(open_clip())
    found = []
    for path, gate in (("tiled", 200), ("triton", 400)):
        ms, mib = measure(clip(path))
        needed = 8 * N * N * D / 1e9  # 10^9 operations: over milliseconds, TFLOP/s
        case = f"CLIP N={N} D={D} bf16, {path}"
        found.append(Row.of(case, "ms", ms, needed / gate, f"{gate} TFLOP/s", 1.0))
        found.append(Row.of(case, "ms", ms, peer_ms, "open_clip"))
        found.append(Row.of(case, "peak MiB", mib, peer_mib, "open_clip"))
        found.append(Row.of(case, "peak MiB", mib, INF_CL_MIB, "Inf-CL, as published, 1 of 8 ranks"))
    torch.backends.cuda.matmul.allow_tf32 = True
    ms, mib = measure(symile())
    found.append(Row.of(f"Symile all, M=3 N={SYMILE_N} D={D}, TF32", "ms", ms, 120.0, "the aim", None, 1.0))
    found.append(Row.of(f"Symile all, M=3 N={SYMILE_N} D={D}, TF32", "peak MiB", mib, 1024.0, "the gate", 1.0))
    show("Losses on a GPU, forward and backward", found)
    write(RESULT, found, "torch", "open_clip_torch", "mmrep")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
