"""Thousands of steps on small towers, through the command line: what grows?

Trains pairwise CLIP on two modalities of vectors, validates and saves every 64 steps, with a loader worker beside it, in one
process and on two ranks. Memory and open files must stay where they are after a warm-up, metrics.csv must grow by the same
bytes for the same steps, and no process may say anything twice on stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.machine import machine, versions
from benchmarks.soak_stderr import repeated, stderr_in
from mmrep.cli import main as mmrep
from mmrep.data.build import build_index
from mmrep.data.index import Modality
from mmrep.data.writer import npy_bytes, write_shard

SIZE, SAMPLES, BATCH = 16, 2048, 32
RESULT = Path("benchmarks/results/soak.json")
WARM_UP = 0.3
"""Share of the steps after which nothing may grow: allocators, caches and lazy imports have then what they need."""
MOST_GROWTH = 8e6
"""Bytes that memory may grow by per rank, from warm-up to end: what it grows by in a typical window, times their number."""
WINDOWS = 10
"""A window may jump, once for each process: a full garbage collection writes to every object, and so copies at one time what a
fork had left to several processes."""
FEWEST_STEPS = 1000
"""Of fewer, the windows have no or few notes."""
Note = dict[str, int]


def main(argv: list[str] | None = None) -> int:
    """Run both cases; gives 1 if anything grew or was repeated."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=5000, help=f"at least {FEWEST_STEPS} (5000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="one run for each")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(argv)
    if options.steps < FEWEST_STEPS:
        parser.error(f"--steps {options.steps}: give at least {FEWEST_STEPS}, or there is nothing to judge")
    runs = [soak(ranks, options.steps) for ranks in options.ranks]
    for run in runs:
        show(run)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(), "versions": versions("torch", "pytorch-lightning"), "runs": runs}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(run["faults"] for run in runs))


def soak(ranks: int, steps: int) -> dict[str, Any]:
    """Train; gives the figures of each rank, and what is wrong with them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder / "shards")
        (folder / "config.yaml").write_text(yaml.safe_dump(config(folder, ranks, steps)))
        began = time.monotonic()
        with stderr_in(folder / "stderr.txt"):
            code = mmrep(["fit", "--config", str(folder / "config.yaml")])
        seconds = time.monotonic() - began
        said = (folder / "stderr.txt").read_text(errors="replace").splitlines()
        if code:
            raise RuntimeError("\n".join(said[-20:]))
        notes = [
            [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]
            for rank in range(ranks)
        ]
    figures = [growth(rank, steps) for rank in notes]
    processes = sum(rank[-1]["processes"] for rank in notes)
    again = repeated(said, processes)
    faults = [fault for rank in figures for fault in rank["faults"]] + [f"said again: {line}" for line in again]
    return {
        "ranks": ranks,
        "steps": steps,
        "seconds": round(seconds, 1),
        "growth": figures,
        "repeated": again,
        "faults": faults,
        "notes": [rank[:: max(1, len(rank) // 20)] for rank in notes],
    }


def growth(notes: Sequence[Note], steps: int) -> dict[str, Any]:
    """What grew from the warm-up to the end, and what of it is too much."""
    late = [note for note in notes if note["step"] >= WARM_UP * steps]
    at = np.array([note["step"] for note in late], dtype=float)
    held = [np.median([note["memory"] for note in part]) for part in np.array_split(np.array(late), WINDOWS)]
    steps_up = np.diff(held)
    memory, jumps = float(np.median(steps_up)) * WINDOWS, [round(up) for up in steps_up if up > MOST_GROWTH]
    files = max(note["files"] for note in late[len(late) // 2 :]) - max(
        note["files"] for note in late[: len(late) // 2]
    )
    written = np.array([note["metrics"] for note in late], dtype=float)
    first, second = np.diff(np.interp([at[0], (at[0] + at[-1]) / 2, at[-1]], at, written)).tolist()
    grew = first > 0 and second > 0
    bend = second / first if grew else 0.0
    faults = [f"memory grew by {memory / 1e6:.1f} MB"] if memory > MOST_GROWTH else []
    faults += [f"memory jumped {len(jumps)} times"] if len(jumps) > late[-1]["processes"] else []
    faults += [f"{files} more files are open"] if files > 0 else []
    faults += [f"metrics.csv grew {bend:.2f} times as much in the second half"] if bend > 1.1 else []
    faults += [] if grew else ["metrics.csv does not grow"]
    return {
        "memory_bytes": round(memory),
        "jumps_bytes": jumps,
        "files": files,
        "metrics_second_half": round(bend, 3),
        "faults": faults,
    }


def config(folder: Path, ranks: int, steps: int) -> dict[str, Any]:
    """A small model of two modalities; a step takes a few milliseconds."""
    encoder = {"class_path": "mmrep.encoders.FeaturesEncoder", "init_args": {"size": SIZE, "width": 32}}
    model = {"embed_dim": 16, "encoders": {"one": encoder, "other": encoder}, "lr": 1e-3}
    watch = {"class_path": "benchmarks.soak_watch.SoakWatch", "init_args": {"folder": str(folder)}}
    trainer = {"accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "callbacks": [watch]}
    return {
        "model": {"class_path": "mmrep.modules.PairwiseCLIP", "init_args": model},
        "data": {"path": str(folder / "shards"), "global_batch_size": BATCH, "num_workers": 1},
        "trainer": trainer | ({"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {}),
        "runs": str(folder / "runs"),
        "name": "soak",
    }


def write_shards(folder: Path) -> None:
    """Pairs of vectors, the second a noisy copy of the first."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, samples in (("train", SAMPLES), ("val", 64)):
        for shard in range(2):
            rows = random.standard_normal((samples // 2, SIZE)).astype(np.float32)
            noisy = rows + 0.3 * random.standard_normal(rows.shape).astype(np.float32)
            members = [
                {"__key__": f"{split}-{shard}-{i:05d}", "one.npy": npy_bytes(a), "other.npy": npy_bytes(b)}
                for i, (a, b) in enumerate(zip(rows, noisy, strict=True))
            ]
            write_shard(folder / f"{split}-{shard:06d}.tar", members)
    build_index(folder, {name: Modality((f"{name}.npy",), "array") for name in ("one", "other")}).save()


def show(run: dict[str, Any]) -> None:
    """A table of the first rank's notes, and the verdict."""
    print(f"{run['ranks']} rank(s), {run['steps']} steps in {run['seconds']} s")
    print(f"{'step':>8} {'memory MB':>10} {'open files':>11} {'metrics.csv kB':>15}")
    for note in run["notes"][0]:
        print(f"{note['step']:8} {note['memory'] / 1e6:10.1f} {note['files']:11} {note['metrics'] / 1e3:15.1f}")
    for number, rank in enumerate(run["growth"]):
        print(
            f"rank {number}, after {WARM_UP:.0%} of the steps: memory {rank['memory_bytes'] / 1e6:+.2f} MB"
            f" and jumps of {[round(jump / 1e6) for jump in rank['jumps_bytes']]} MB,"
            f" open files {rank['files']:+d}, metrics.csv second half / first half {rank['metrics_second_half']}"
        )
    print("; ".join(run["faults"]) or "flat, and nothing said twice")


if __name__ == "__main__":
    sys.exit(main())
