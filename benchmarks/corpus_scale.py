"""``python -m benchmarks.corpus_scale``: the two jobs over a whole corpus, by one process, several, and Ray.

A table of 2,000 pictures, as paths in a CSV and as bytes in Parquet, becomes 20 shards; a small untrained model embeds them.
Each way does the same work from nothing, in turn; the median of the rounds counts. CPU time is that of all processes that the
job started. The start of Ray is a row of its own; that of its workers, which import torch, is in each job. Prints
ratios to one process, writes ``corpus_scale.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Row, show, write
from data_prep.table import main as table
from mmrep.cli import main as mmrep
from mmrep.encoders import ConvImageEncoder, NgramTextEncoder
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.ray_engine import LOCAL, ray_session

RESULT = Path("benchmarks/results/corpus_scale.json")
PICTURES, SIZE, A_SHARD = 2000, 192, 100
TICKS = os.sysconf("SC_CLK_TCK")

Seconds = tuple[float, float]
"""CPU and wall."""


def make_tables(folder: Path) -> None:
    """``t.csv`` with paths, ``t.parquet`` with the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, cells, lines = np.random.default_rng(0), [], ["image,caption"]
    for number in range(PICTURES):
        coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        cells.append({"bytes": buffer.getvalue(), "path": f"{number}.jpg"})
        lines.append(f"{number}.jpg,picture {number}")
    (folder / "t.csv").write_text("\n".join(lines) + "\n")
    captions = [f"picture {number}" for number in range(PICTURES)]
    pq.write_table(pa.table({"image": cells, "caption": captions}), folder / "t.parquet", row_group_size=100)


def cpu_seconds(process: int) -> float:
    """CPU seconds of a process, of those below it, and of those that have ended below it."""
    total = 0.0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
        total += sum(map(int, fields[11:15])) / TICKS
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(cpu_seconds(int(child)) for child in (task / "children").read_text().split())
    return total


@contextlib.contextmanager
def timed(found: list[Seconds]) -> Iterator[None]:
    """Notes what the block takes; what it prints is dropped."""
    cpu, wall = cpu_seconds(os.getpid()), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    found.append((cpu_seconds(os.getpid()) - cpu, time.monotonic() - wall))


def make_shards(folder: Path, name: str, *options: str) -> None:
    """The first job."""
    out = folder / "shards"
    shutil.rmtree(out, ignore_errors=True)
    words = ["--table", str(folder / name), "--out", str(out), "--image", "image", "--text", "caption"]
    if table([*words, "--samples-per-shard", str(A_SHARD), *options]):
        raise RuntimeError("the shards were not made")


def embed(folder: Path, *options: str) -> None:
    """The second job."""
    out = folder / "embeddings"
    shutil.rmtree(out, ignore_errors=True)
    words = ["embed", "--checkpoint", str(folder / "model"), "--data", str(folder / "shards"), "--out", str(out)]
    if mmrep([*words, "--format", "parquet", "--device", "cpu", *options]):
        raise RuntimeError("the shards were not embedded")


SHARDS, EMBEDDINGS = "shards of 2,000 pictures", "embeddings of 2,000 pictures and texts"
ONE = "one process"
Ways = dict[tuple[str, str], Callable[[], None]]
"""Job and way -> what does it."""


def plain(folder: Path) -> Ways:
    """Without Ray."""
    return {
        (SHARDS, ONE): lambda: make_shards(folder, "t.csv", "--workers", "1"),
        (SHARDS, "two processes"): lambda: make_shards(folder, "t.csv", "--workers", "2"),
        (SHARDS, "one process, Parquet"): lambda: make_shards(folder, "t.parquet", "--workers", "1"),
        (EMBEDDINGS, ONE): lambda: embed(folder),
    }


def on_ray(folder: Path) -> Ways:
    """With a Ray that is there."""
    words = ("--engine", "ray", "--concurrency", "2")
    return {
        (SHARDS, "two Ray workers"): lambda: make_shards(folder, "t.csv", "--workers", "2", *words),
        (EMBEDDINGS, "two Ray workers"): lambda: embed(folder, *words),
    }


def medians(ways: Ways, rounds: int) -> dict[tuple[str, str], Seconds]:
    """What each way takes, done in turn."""
    taken: dict[tuple[str, str], list[Seconds]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, work in ways.items():
            with timed(taken[way]):
                work()
    return {
        way: (statistics.median(cpu), statistics.median(wall))
        for way, found in taken.items()
        for cpu, wall in [zip(*found, strict=True)]
    }


def rows(folder: Path, rounds: int) -> list[Row]:
    """All of it. Ray's workers are no children of this process: of them only wall time is known."""
    found = medians(plain(folder), rounds)
    result = [
        Row.of(f"{job}, {way}", "CPU s", seconds[0], found[job, ONE][0], ONE)
        for (job, way), seconds in found.items()
        if way != ONE
    ]
    start: list[Seconds] = []
    with contextlib.ExitStack() as stack:
        with timed(start):
            stack.enter_context(ray_session(LOCAL, num_cpus=2))
        for (job, way), seconds in medians(on_ray(folder), rounds).items():
            result.append(Row.of(f"{job}, {way}", "wall s", seconds[1], found[job, ONE][1], ONE))
    return [*result, Row.of("start of Ray", "wall s", start[0][1], found[EMBEDDINGS, ONE][1], f"{EMBEDDINGS}, {ONE}")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpus_scale", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"where the JSON goes ({RESULT})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_tables(folder)
        encoders = {"image": ConvImageEncoder(64, image_size=64, width=32), "text": NgramTextEncoder(64)}
        MultimodalModel(encoders, PairwiseCLIPLoss()).save_pretrained(folder / "model")
        found = rows(folder, options.rounds)
    show("Whole corpora", found)
    write(options.out, found, "torch", "ray", "pyarrow", "mmrep", rounds=options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
