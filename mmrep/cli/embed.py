"""``mmrep embed``: shards -> embeddings on disk, which ``mmrep search`` searches."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmrep.cli.devices import choose_device
from mmrep.errors import ConfigError, Fault
from mmrep.progress import progress

MOST_LISTED = 10
"""Broken samples that are printed; the manifest has all."""


def run(arguments: list[str]) -> int:
    """Run ``embed ...``."""
    options = _parser().parse_args(arguments[1:])
    worker, workers = work_share(options.shard_index, options.num_shards, os.environ)
    if options.batch_size < 1 or options.num_workers < 0:
        raise ConfigError(f"--batch-size {options.batch_size}, --num-workers {options.num_workers}")
    return _embed(options, worker, workers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmrep embed",
        description="Embed every sample of some shards, a file per shard. Finished shards are kept: run it again after an "
        "interruption, or run many of it at once, each with its --shard-index.",
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, model folder, or .ckpt")
    parser.add_argument("--data", required=True, help="folder or URL of shards with an index.json")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the embeddings")
    parser.add_argument("--split", action="append", help="only this one; may be repeated (default: all)")
    parser.add_argument("--modality", action="append", help="only this one; may be repeated (default: all)")
    parser.add_argument("--format", default="npy", help="npy (mapped into memory) or parquet (default: npy)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples embedded at once")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument(
        "--shard-index",
        type=int,
        help="which share of the shards this process embeds, from 0 (default: SLURM_ARRAY_TASK_ID, or RANK)",
    )
    parser.add_argument(
        "--num-shards", type=int, help="how many processes share them (default: SLURM_ARRAY_TASK_COUNT, or WORLD_SIZE)"
    )
    return parser


def work_share(index: int | None, count: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """Which share of the work is this process's, out of how many: as asked for, or of a SLURM array, of torchrun, or of both.

    Raises:
        ConfigError: If one of the two is given without the other.
    """
    if (index is None) != (count is None):
        raise ConfigError("--shard-index and --num-shards belong together", fix="give both, or none")
    if index is not None and count is not None:
        return index, count
    task, tasks = _share("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", environment, "SLURM_ARRAY_TASK_MIN")
    rank, ranks = _share("RANK", "WORLD_SIZE", environment)
    return task * ranks + rank, tasks * ranks


def _share(place: str, total: str, environment: Mapping[str, str], first: str = "") -> tuple[int, int]:
    if place not in environment or total not in environment:
        return 0, 1
    try:
        return int(environment[place]) - int(environment.get(first, 0)), int(environment[total])
    except ValueError as error:
        raise ConfigError(f"{place}={environment[place]}", fix="give --shard-index and --num-shards") from error


def _embed(options: argparse.Namespace, worker: int, workers: int) -> int:
    from mmrep.data.index import Index
    from mmrep.interop import load
    from mmrep.search import EmbeddingJob

    index = Index.load(options.data)
    model = load(options.checkpoint).to(choose_device(options.device))
    job = EmbeddingJob(
        model,
        index,
        Path(options.out),
        data=options.data,
        splits=options.split,
        modalities=options.modality,
        file_format=options.format,
        worker=worker,
        workers=workers,
    )
    todo = len(job.pending)
    with progress("embedding", job.num_samples) as advance:
        faults = job.run(batch_size=options.batch_size, num_workers=options.num_workers, advance=advance)
    _list_broken(faults)
    manifest = job.finish()
    print(f"{options.out}: {todo} shards embedded, {job.kept} were there")
    if manifest is None:
        print("shards of other processes are not finished yet; the last to finish completes the manifest")
    else:
        rows = sum(record.rows for record in manifest.shards)
        broken = sum(len(record.faults) for record in manifest.shards)
        without = f", without {broken} broken samples (listed in manifest.json)" if broken else ""
        print(f"complete: {rows} samples in {len(manifest.shards)} shards{without}")
    return 0


def _list_broken(faults: Sequence[Fault]) -> None:
    for fault in faults[:MOST_LISTED]:
        print(f"left out: {fault.shard}:{fault.key}: {fault.detail}", file=sys.stderr)
    if len(faults) > MOST_LISTED:
        print(f"left out: {len(faults) - MOST_LISTED} more", file=sys.stderr)
