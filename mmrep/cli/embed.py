"""``mmrep embed``: shards -> embeddings on disk, which ``mmrep search`` searches."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmrep.cli.ray_options import ENGINES, add_engine_options, ray_settings
from mmrep.cli.work_share import WorkShare, local_rank, work_share
from mmrep.devices import choose_device
from mmrep.errors import ConfigError, Fault, check_choice
from mmrep.printing import printable
from mmrep.progress import progress
from mmrep.stopping import Stopped, stopped_by_signals

if TYPE_CHECKING:
    from mmrep.model import MultimodalModel
    from mmrep.search import EmbeddingJob

MOST_LISTED = 10
"""Broken samples that are printed; the manifest has all."""


def run(arguments: list[str]) -> int:
    """Run ``embed ...``; after SIGTERM or SIGINT the exit code is 128 + the signal's number."""
    options = _parser().parse_args(arguments[1:])
    check_choice("--engine", options.engine, ENGINES)
    share = work_share(options.shard_index, options.num_shards, os.environ)
    if options.batch_size < 1 or options.num_workers < 0:
        raise ConfigError(f"--batch-size {options.batch_size}, --num-workers {options.num_workers}")
    if options.engine == "ray" and share.count > 1:
        raise ConfigError(f"--engine ray, and {share}", fix="Ray shares the shards itself: start one process")
    try:
        with stopped_by_signals():
            return _embed(options, share)
    except Stopped as stop:
        print(
            f"mmrep embed: stopped by {stop.name}; finished shards are kept, the same command goes on", file=sys.stderr
        )
        return stop.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmrep embed",
        description="Embed every sample of some shards, a file per shard. Finished shards are kept: run it again after an "
        "interruption, or run many of it at once (torchrun, srun, a SLURM array, or each with its --shard-index), or on Ray.",
    )
    parser.add_argument("--checkpoint", required=True, help="run folder, model folder, or .ckpt")
    parser.add_argument("--data", required=True, help="folder or URL of shards with an index.json")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the embeddings")
    parser.add_argument("--split", action="append", help="only this one; may be repeated (default: all)")
    parser.add_argument("--modality", action="append", help="only this one; may be repeated (default: all)")
    parser.add_argument("--format", default="npy", help="npy (mapped into memory) or parquet (default: npy)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples embedded at once")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: this rank's GPU where there is one)")
    parser.add_argument(
        "--shard-index",
        type=int,
        help="which share of the shards this process embeds, from 0 (default: SLURM_ARRAY_TASK_ID, RANK or SLURM_PROCID; "
        "an array of several processes multiplies)",
    )
    parser.add_argument("--num-shards", type=int, help="how many processes share them")
    add_engine_options(parser)
    return parser


def _embed(options: argparse.Namespace, share: WorkShare) -> int:
    from mmrep.data.index import Index
    from mmrep.interop import load
    from mmrep.search import EmbeddingJob

    on_ray = ray_settings(options) if options.engine == "ray" else None
    device = choose_device("cpu" if on_ray else _own_device(options.device))
    if share.said_by:
        print(f"{share}, on {device}", file=sys.stderr)
    index = Index.load(options.data)
    model: MultimodalModel = load(options.checkpoint).to(device)
    job = EmbeddingJob(
        model,
        index,
        Path(options.out),
        data=options.data,
        splits=options.split,
        modalities=options.modality,
        file_format=options.format,
        worker=share.index,
        workers=share.count,
    )
    _work(job, options)
    return _finish(job, options.out, share)


def _own_device(asked: str | None) -> str | None:
    """``cuda`` means this rank's GPU: the processes of a machine take them in turn."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{local_rank(os.environ) % count}" if asked in (None, "cuda") and count else asked


def _work(job: EmbeddingJob, options: argparse.Namespace) -> None:
    batches = {"batch_size": options.batch_size, "num_workers": options.num_workers}
    with progress("embedding", job.num_samples) as advance:
        if options.engine == "ray":
            from mmrep.search.ray_job import run_on_ray

            faults = run_on_ray(
                job, options.data, ray_settings(options), device=options.device, advance=advance, **batches
            )
        else:
            faults = job.run(advance=advance, **batches)
    _list_broken(faults)


def _finish(job: EmbeddingJob, out: str, share: WorkShare) -> int:
    manifest = job.finish()
    print(f"{out}: {len(job.pending)} shards embedded, {job.kept} were there")
    if manifest is None:
        print("shards of other processes are not finished yet; the last to finish completes the manifest")
        if share.said_by and share.count > 1:
            print(f"(this was {share}; if it was meant to do all shards: --shard-index 0 --num-shards 1)")
    else:
        rows = sum(record.rows for record in manifest.shards)
        broken = sum(len(record.faults) for record in manifest.shards)
        without = f", without {broken} broken samples (listed in manifest.json)" if broken else ""
        print(f"complete: {rows} samples in {len(manifest.shards)} shards{without}")
    return 0


def _list_broken(faults: Sequence[Fault]) -> None:
    for fault in faults[:MOST_LISTED]:
        print(printable(f"left out: {fault.shard}:{fault.key}: {fault.detail}"), file=sys.stderr)
    if len(faults) > MOST_LISTED:
        print(f"left out: {len(faults) - MOST_LISTED} more", file=sys.stderr)
