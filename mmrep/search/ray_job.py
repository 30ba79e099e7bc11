"""The embedding job on Ray: each worker loads the model once, and embeds the shards that Ray Data hands to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmrep.data.index import Index
from mmrep.data.locations import is_url
from mmrep.devices import choose_device
from mmrep.errors import Fault
from mmrep.model import MultimodalModel
from mmrep.ray_engine import RaySettings, Worker, map_shards
from mmrep.search.embed import MODEL, EmbeddingJob


@dataclass(frozen=True)
class _Task:
    """What a worker must know; the folders are seen by all of them. The model is the one that the job stored."""

    data: str
    out: Path
    splits: list[str]
    modalities: list[str]
    file_format: str
    batch_size: int
    num_workers: int
    device: str | None


def run_on_ray(
    job: EmbeddingJob,
    data: str,
    settings: RaySettings,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Fault]:
    """Embed what is pending; the files are those of `EmbeddingJob.run`, byte for byte.

    Args:
        job: The job, of all shards.
        data: Where the index is.
        settings: Where Ray is, and what a worker needs.
        batch_size, num_workers, advance: As of `EmbeddingJob.run`, but for a whole shard at a time.
        device: Of the model in a worker; by default the GPU that Ray gave it, or the CPU.

    Returns:
        The samples that could not be used.

    Raises:
        MmrepError: When the other shards are done: what a worker raised.
    """
    source = job.source
    place = data if is_url(data) else str(Path(data).resolve())
    task = _Task(
        *(place, job.out.resolve(), source.splits, list(source.modalities), source.file_format),
        *(batch_size, num_workers, device),
    )
    sizes = {shard.name: shard.samples for shard in job.pending}
    faults: list[Fault] = []
    for name, found in map_shards(partial(_worker, task), list(sizes), settings):
        faults += [Fault(**fault) for fault in found]
        if advance is not None:
            advance(sizes[name])
    return _in_order(faults, list(sizes))


def _worker(task: _Task) -> Worker:
    index = Index.load(task.data)
    model = MultimodalModel.from_pretrained(task.out / MODEL).to(
        choose_device(task.device, fix="a Ray worker sees the GPUs of --num-gpus: give --num-gpus 1, or --device cpu")
    )
    job = EmbeddingJob(
        model,
        index,
        task.out,
        data=task.data,
        splits=task.splits,
        modalities=task.modalities,
        file_format=task.file_format,
    )
    shards = {shard.name: shard for shard in job.mine}

    def embed(name: str) -> list[dict[str, Any]]:
        found = job.run(shards=[shards[name]], batch_size=task.batch_size, num_workers=task.num_workers)
        return [asdict(fault) for fault in found]

    return embed


def _in_order(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    places = {name: place for place, name in enumerate(names)}
    return sorted(faults, key=lambda fault: places[fault.shard])
