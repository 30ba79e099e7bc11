"""The data, decoded and transformed once: arrays on the disk that all trainings map into their memory."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.compare.encoders import CachedMelEncoder, make_encoders
from benchmarks.compare.settings import MODALITIES, Settings
from mmrep.data.dataset import GROUP, ShardDataset, content_label
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.errors import DataError
from mmrep.progress import progress
from mmrep.stable_hash import stable_hash

CHUNK = 256
"""Samples that a process prepares at a time."""


@dataclass(frozen=True)
class Split:
    """A split in memory.

    Attributes:
        inputs: Modality -> ``[draws, N, ...]``, mapped from the disk: uint8 pictures, int16 n-grams, fp16 spectrograms.
        labels: As in `Batch`, int64 ``[N]`` each; none in training.
        keys: The samples' keys.
    """

    inputs: dict[str, np.ndarray]
    labels: dict[str, Tensor]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, modality: str, draw: int, numbers: np.ndarray) -> Tensor:
        """One draw of some samples ``[B, ...]``."""
        rows = torch.from_numpy(self.inputs[modality][draw % len(self.inputs[modality])][numbers])
        return rows.int() if modality == "text" else rows


@dataclass(frozen=True)
class Job:
    """Some samples of a split, drawn once."""

    data: Path
    split: str
    settings: Settings
    draw: int
    numbers: range
    train: bool


def load_split(data: Path, split: str, settings: Settings, cache: Path, *, train: bool, workers: int = 1) -> Split:
    """A split, from the cache or into it.

    Args:
        data: Folder of shards with an index.json.
        split: Which.
        settings: How samples are transformed.
        cache: Where the arrays are kept, a folder for each split and settings.
        train: Whether samples are augmented, each ``settings.draws`` times; else once, and with their labels.
        workers: Processes.
    """
    index = Index.load(data)
    samples = Samples(index, split)
    draws = settings.draws[data.name] if train else 1
    limit = settings.limit[data.name] if train else 0
    count = min(len(samples), limit or len(samples))
    what = {k: v for k, v in asdict(settings).items() if k.startswith(("image_size", "text_", "seconds"))}
    name = f"{data.name}-{split}-{stable_hash(json.dumps([what, draws, count, train, index.fingerprint])):016x}"
    if not (cache / name / "labels.json").exists():
        jobs = [
            Job(data, split, settings, draw, range(start, min(start + CHUNK, count)), train)
            for draw in range(draws)
            for start in range(0, count, CHUNK)
        ]
        _write(cache / name, jobs, (draws, count), workers)
    labels = {
        key: torch.tensor(values) for key, values in json.loads((cache / name / "labels.json").read_text()).items()
    }
    arrays = {modality: np.load(cache / name / f"{modality}.npy", mmap_mode="r") for modality in MODALITIES}
    return Split(arrays, labels, [samples.key(number) for number in range(count)])


def _write(folder: Path, jobs: Sequence[Job], shape: tuple[int, int], workers: int) -> None:
    """Prepare all jobs and write the arrays, beside and renamed, the labels last."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    arrays: dict[str, np.ndarray] = {}
    labels: dict[str, list[int]] = {}
    with progress(f"preparing {jobs[0].data.name}, {jobs[0].split}", shape[0] * shape[1]) as advance:
        for job, (rows, found) in zip(jobs, _run(jobs, workers), strict=True):
            for name, values in rows.items():
                if name not in arrays:
                    whole = (*shape, *values.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(part / f"{name}.npy", "w+", values.dtype, whole)
                arrays[name][job.draw, job.numbers.start : job.numbers.stop] = values
            for name, numbers in found.items():
                labels.setdefault(name, []).extend(numbers)
            advance(len(job.numbers))
    for array in arrays.values():
        cast(np.memmap, array).flush()
    (part / "labels.json").write_text(json.dumps(labels))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _run(jobs: Sequence[Job], workers: int) -> Iterator[tuple[dict[str, np.ndarray], dict[str, list[int]]]]:
    """The results in the order of the jobs."""
    if workers < 2 or len(jobs) < 2 * workers:
        yield from map(prepare, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(prepare, jobs)


def prepare(job: Job) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """Decode and transform samples: modality -> ``[n, ...]``, and their labels, by which retrieval knows right answers."""
    torch.set_num_threads(1)
    encoders = make_encoders(job.settings)
    dataset = ShardDataset(Samples(Index.load(job.data), job.split), encoders, train=job.train)
    samples = [dataset.load(0, job.draw, number) for number in job.numbers]
    if gaps := [sample.key for sample in samples if len(sample.values) < len(MODALITIES)]:
        raise DataError(f"sample {gaps[0]} lacks a modality", where=job.data, fix="give complete samples: Emoji-M3")
    rows = {name: torch.stack([cast(Tensor, sample.values[name]) for sample in samples]) for name in MODALITIES}
    rows["audio"] = cast(CachedMelEncoder, encoders["audio"]).mel(rows["audio"]).half()
    rows["text"] = rows["text"].to(torch.int16)  # buckets fit
    wanted = [] if job.train else [GROUP, *(content_label(name) for name in MODALITIES)]
    labels = {name: [sample.labels[name] for sample in samples] for name in wanted}
    return {name: values.numpy() for name, values in rows.items()}, labels
