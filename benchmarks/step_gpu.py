"""``python -m benchmarks.step_gpu``: bf16 throughput of ViT-B/32 and its text tower on one GPU, beside open_clip's own loop.

First the largest batch, in powers of two, that a step holds in one graph, of mmrep and of open_clip. At the smaller of the
two, B: mmrep and ``open_clip_train.train.train_one_epoch`` in one graph, then mmrep in parts. At 4 B: mmrep in parts of B / 2
against ``--accum-freq 8`` of open_clip with batches of B / 2. Batches are on the device already. Times are of whole steps with
AdamW, after one that warms up; peaks are of the allocator and include weights and batches. Prints a table, writes
``step_gpu.json``. ``--device cpu --tiny`` runs the same with small towers, without peaks.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, show, write
from mmrep.encoders import OpenClipImageEncoder, OpenClipTextEncoder
from mmrep.modules import PairwiseCLIP
from mmrep.modules.optim import make_optimizer

RESULT = Path("benchmarks/results/step_gpu.json")
VIT_B_32: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
}
LR, FACTOR, PARTS = 1e-4, 4, 8
"""Learning rate; how much larger the batch is that needs parts; parts of a batch that would fit."""
Train = Callable[[int], None]
"""Takes so many steps."""


@dataclass(frozen=True)
class Machine:
    """Where the towers run."""

    device: str
    model: dict[str, Any]

    def pictures(self, n: int) -> Tensor:
        size = self.model["vision_cfg"]["image_size"]
        return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=self.device)

    def texts(self, n: int) -> Tensor:
        text = self.model["text_cfg"]
        tokens = torch.randint(1, text["vocab_size"] - 1, (n, text["context_length"]), device=self.device)
        tokens[:, -1] = text["vocab_size"] - 1  # the end of a text, whose row is the text's
        return tokens


def mmrep_training(machine: Machine, batch: int, micro_batch_size: int | None = None) -> Train:
    """Steps of one batch, in parts or not."""
    torch.manual_seed(0)
    model, width = machine.model, machine.model["embed_dim"]
    encoders: dict[str, Any] = {
        "image": lambda d: OpenClipImageEncoder(d, model, projection=False),
        "text": lambda d: OpenClipTextEncoder(d, model, projection=False),
    }
    module = PairwiseCLIP(encoders, embed_dim=width, micro_batch_size=micro_batch_size).to(machine.device)
    optimizer = make_optimizer("adamw", module, module.model.loss.not_decayed(), lr=LR, weight_decay=0.2)
    inputs = {"image": machine.pictures(batch), "text": machine.texts(batch)}

    def train(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(machine.device, torch.bfloat16):
                loss = module.model.loss(module.model(inputs, module.caching)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def open_clip_training(machine: Machine, batch: int, accum_freq: int = 1) -> Train:
    """open_clip's own loop over batches of ``batch / accum_freq``, as ``--precision amp_bf16 --accum-freq`` runs it."""
    import open_clip
    from open_clip.loss import ClipLoss

    train_one_epoch = importlib.import_module("open_clip_train.train").train_one_epoch
    torch.manual_seed(0)
    model = open_clip.CLIP(**machine.model, output_dict=True).to(machine.device)
    kept = [weight for weight in model.parameters() if weight.ndim < 2]
    rest = [weight for weight in model.parameters() if weight.ndim >= 2]
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    part = batch // accum_freq
    pairs = [(machine.pictures(part).float() / 127.5 - 1, machine.texts(part)) for _ in range(accum_freq)]

    class Loader:
        def __init__(self, steps: int) -> None:
            self.num_batches, self.num_samples = steps * accum_freq, steps * batch

        def __iter__(self) -> Any:
            return iter(pairs * (self.num_batches // accum_freq))

    def train(steps: int) -> None:
        data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader(steps))}
        options = _open_clip_options(machine.device, part, accum_freq)
        train_one_epoch(model, data, ClipLoss(), 0, optimizer, None, None, None, options)

    return train


def _open_clip_options(device: str, batch: int, accum_freq: int) -> SimpleNamespace:
    """What ``train_one_epoch`` reads of its command line."""
    flags = dict.fromkeys(("distill", "horovod", "log_local", "wandb"), False)
    ranks = {"world_size": 1, "rank": 0, "local_rank": 0}
    return SimpleNamespace(
        device=device,
        precision="amp_bf16",
        accum_freq=accum_freq,
        batch_size=batch,
        skip_scheduler=True,
        grad_clip_norm=None,
        log_every_n_steps=10**6,
        **flags,
        **ranks,
    )


def largest_batch(make: Callable[[int], Train], start: int, limit: int) -> int:
    """The largest ``start * 2^k`` up to ``limit`` whose step fits into memory.

    Raises:
        MemoryError: If not even the first fits.
    """
    fits = 0
    while (batch := fits * 2 or start) <= limit:
        try:
            make(batch)(1)
        except torch.OutOfMemoryError:
            break
        finally:
            _free()
        fits = batch
    if not fits:
        raise MemoryError(f"a batch of {start} does not fit")
    return fits


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(make: Callable[[], Train], device: str, samples: int, rounds: int) -> tuple[float, float]:
    """Milliseconds a sample, the median of steps; and MiB at the peak, NaN on a CPU."""
    train, seconds = make(), []
    train(1)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        _synchronize(device)
        start = time.perf_counter()
        train(1)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else math.nan
    del train
    _free()
    return statistics.median(seconds) * 1000 / samples, peak


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def compare(machine: Machine, batch: int, rounds: int) -> list[Row]:
    """All rows, where ``batch`` fits in one graph and ``FACTOR`` times as many samples do not."""
    large, half = FACTOR * batch, batch // 2
    whole = measure(lambda: open_clip_training(machine, batch), machine.device, batch, rounds)
    accumulated = measure(lambda: open_clip_training(machine, large, large // half), machine.device, large, rounds)
    sides = [
        (f"batch {batch}, one graph", batch, None, whole, "open_clip", 1.0),
        (f"batch {batch}, {PARTS} parts", batch, batch // PARTS, whole, "open_clip, one graph", None),
        (f"batch {large}, parts of {half}", large, half, accumulated, f"open_clip, accum-freq {large // half}", 1.0),
    ]
    rows = []
    for case, samples, part, theirs, theirs_is, gate in sides:

        def make(samples: int = samples, part: int | None = part) -> Train:
            return mmrep_training(machine, samples, part)

        ours = measure(make, machine.device, samples, rounds)
        rows.append(Row.of(case, "ms a sample", ours[0], theirs[0], theirs_is, gate))
        if machine.device == "cuda":
            rows.append(Row.of(case, "peak MiB", ours[1], theirs[1], theirs_is))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small towers, to try the script")
    parser.add_argument("--limit", type=int, default=2**16, help="no batch beyond this is tried in one graph")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each side")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"where the JSON goes ({RESULT})")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: nothing was measured", file=sys.stderr)
        return 2
    logging.getLogger().setLevel(logging.WARNING)
    machine = Machine(options.device, TINY if options.tiny else VIT_B_32)
    sides: dict[str, Callable[[int], Train]] = {
        "mmrep": lambda batch: mmrep_training(machine, batch),
        "open_clip": lambda batch: open_clip_training(machine, batch),
    }
    largest = {name: largest_batch(make, 2 * PARTS, options.limit) for name, make in sides.items()}
    rows = [Row.of("largest batch in one graph", "samples", largest["mmrep"], largest["open_clip"], "open_clip")]
    rows += compare(machine, min(largest.values()), options.rounds)
    show("A training step in bf16", rows)
    write(options.out, rows, "torch", "open_clip_torch", "mmrep", device=options.device, tiny=options.tiny)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
