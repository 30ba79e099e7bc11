"""``python -m benchmarks.compare``: runs the cells that are not done, prints the table, draws the plot.

Joint (Emoji-M3): text and speech together tell the picture, neither does alone; pairs can reach 50 %. Plain: each modality
alone tells the emoji. In training each modality of each sample is absent with a given probability; tests are on complete
samples, of a vendor and voices that training never had. All objectives get the same encoders, data and steps.

A finished cell is written at once; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from benchmarks.compare.cache import load_split
from benchmarks.compare.plot import plot
from benchmarks.compare.results import Row, read, to_do, with_row, write
from benchmarks.compare.settings import BY_NAME, MISSING, SEEDS, TASKS, Cell, Settings, cells, digest
from benchmarks.compare.table import markdown, print_table
from benchmarks.compare.train import TEST_SPLIT, run_cell
from data_prep.emoji_m3.__main__ import main as build_emoji_m3
from mmrep.data.index import Index
from mmrep.errors import MmrepError

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
"""Freed memory stays with the process, as in `benchmarks.xor`."""


def main(argv: list[str] | None = None, settings: Settings | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    options = _parser().parse_args(argv)
    try:
        return _run(options, settings or Settings())
    except MmrepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command to go on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/emoji_m3"), help="where the tasks are, or are built")
    parser.add_argument("--cache", type=Path, default=Path("runs/compare/cache"), help="where prepared samples go")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="of compare.json and compare.png")
    parser.add_argument("--only", action="append", choices=list(BY_NAME), help="only this objective; may be repeated")
    parser.add_argument("--task", action="append", choices=TASKS, help="only this task")
    parser.add_argument("--missing", action="append", type=float, choices=MISSING, help="only this share")
    parser.add_argument(
        "--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1), help="the first so many"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings at a time, one core each")
    parser.add_argument("--table", action="store_true", help="train nothing: print the README's table, draw the plot")
    return parser


def _run(options: argparse.Namespace, settings: Settings) -> int:
    out, rows = options.out / "compare.json", read(options.out / "compare.json")
    if options.table:
        print("\n".join(markdown(rows)))
    else:
        wanted = cells(
            options.only or BY_NAME, options.task or TASKS, options.missing or MISSING, SEEDS[: options.seeds]
        )
        rows = _measure(wanted, rows, options, settings)
        print_table(rows)
    plot(rows, options.out / "compare.png")
    print(f"{out} and {options.out / 'compare.png'}")
    return 0


def _measure(wanted: Sequence[Cell], rows: list[Row], options: argparse.Namespace, settings: Settings) -> list[Row]:
    """All rows, those of the cells that were not done among them; each is written as soon as it is there."""
    tasks = sorted({cell.task for cell in wanted})
    there = all((options.data / task / "index.json").exists() for task in tasks)
    if not there and build_emoji_m3(["--out", str(options.data), "--size", "mini"]):
        raise MmrepError("Emoji-M3 could not be built", where=options.data)
    fingerprints = {task: Index.load(options.data / task).fingerprint for task in tasks}
    digests = {cell: digest(cell, settings, fingerprints[cell.task]) for cell in wanted}
    left = to_do(wanted, rows, digests)
    print(f"{len(wanted)} cells, {len(wanted) - len(left)} of them done", file=sys.stderr)
    for task in sorted({cell.task for cell in left}):  # once, and not in every worker
        for split, train in (("train", True), (TEST_SPLIT, False)):
            load_split(options.data / task, split, settings, options.cache, train=train, workers=options.workers)
    work = partial(run_cell, settings=settings, data=options.data, cache=options.cache)
    for row in _report(_results(work, left, options.workers), len(left)):
        cell = Cell(row["objective"], row["task"], row["missing"], row["seed"])
        rows = with_row(rows, {**row, "digest": digests[cell]})
        write(options.out / "compare.json", rows, settings)
    return rows


def _results(work: partial[Row], left: Sequence[Cell], workers: int) -> Iterator[Row]:
    """The rows, as they are done. A worker that dies ends the run with an error, and does not leave it waiting."""
    if workers < 2:
        yield from map(work, left)
        return
    os.environ.update(KEEP_MEMORY)  # read by the C library when a process starts
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(work, cell) for cell in left]):
                yield future.result()
        except BrokenProcessPool as error:
            raise MmrepError(
                "a training's process died, maybe for want of memory", fix="give fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _report(rows: Iterator[Row], total: int) -> Iterator[Row]:
    """Passes the rows on, and says a line of each: figure, time, and how long the rest will take."""
    start = time.monotonic()
    for done, row in enumerate(rows, 1):
        left = (time.monotonic() - start) / done * (total - done)
        what = f"{row['task']}, {100 * row['missing']:.0f} % missing, seed {row['seed']}, {row['objective']}"
        figure = f"recall@1 {100 * row['recall@1']:.1f} %"
        print(
            f"{done}/{total}  {what}: {figure}  {row['seconds']:.0f} s  ETA {left / 60:.0f} min",
            file=sys.stderr,
            flush=True,
        )
        yield row


if __name__ == "__main__":
    sys.exit(main())
