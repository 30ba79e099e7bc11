"""`EmbeddingJob`: shards -> embeddings on disk, a file or folder per shard, by one process or many."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from mmrep.batch import Batch
from mmrep.data.dataset import ShardDataset, content_label, make_loader
from mmrep.data.index import Index, Shard
from mmrep.data.reader import Samples
from mmrep.errors import ConfigError, DataError, Fault, MmrepError, check_choice, did_you_mean
from mmrep.evaluation.embeddings import embed_loader
from mmrep.files import PART
from mmrep.model import MultimodalModel
from mmrep.search.manifest import (
    NAME,
    Manifest,
    ShardRecord,
    Source,
    config_digest,
    model_digest,
    parse_record,
    read_json,
    relative_place,
    write_json,
)
from mmrep.search.row_files import FORMATS, ShardRows, check_installed, check_names
from mmrep.search.shard_plan import ShardPlan
from mmrep.stable_hash import stable_hash

ABANDONED_S = 3600
"""Unfinished files that are older, in seconds, are of a process that was killed."""
ROWS, MODEL = "rows", "model"
"""Below the folder: the embeddings, and the model."""


class EmbeddingJob:
    """One process's share of embedding the shards of some splits.

    A shard is finished when its record ``rows/SHARD.json`` is there, which is written last. Finished shards are kept, others
    are done anew: the job may be stopped at any time, started again, and run by many processes. The process that finds all
    shards finished writes their records into manifest.json.

    Args:
        model: The model; it is stored in the folder too.
        index: Of the shards.
        out: The folder.
        data: Where the index is, to be found again from the folder.
        splits: Which; all by default.
        modalities: Which; all of the model's by default.
        file_format: ``npy`` or ``parquet``.
        worker, workers: Which share of the shards is this process's, out of how many.

    Raises:
        ConfigError: If the folder holds embeddings of another model, other data or another choice, or something else.
    """

    def __init__(
        self,
        model: MultimodalModel,
        index: Index,
        out: Path,
        *,
        data: str,
        splits: Sequence[str] | None = None,
        modalities: Sequence[str] | None = None,
        file_format: str = "npy",
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        check_choice("--format", file_format, FORMATS)
        check_installed(file_format)
        if not 0 <= worker < workers:
            raise ConfigError(f"share {worker} of {workers}", fix="--shard-index counts from 0 to --num-shards - 1")
        self.model, self.index, self.out = model, index, out
        self.encoders = {name: model.by_modality[name] for name in _known(modalities, model)}
        check_names(file_format, self.encoders)
        chosen = list(dict.fromkeys(splits or index.splits))
        shards = {shard.name: shard for split in chosen for shard in index.split(split)}
        self.source = Source(
            model_config=config_digest(model),
            model=model_digest(model),
            modalities={name: encoder.kind for name, encoder in self.encoders.items()},
            embed_dim=model.embed_dim,
            normalize=model.normalize,
            fingerprint=index.fingerprint,
            splits=chosen,
            shards=list(shards),
            file_format=file_format,
        )
        self._prepare(Manifest(self.source, relative_place(data, out)))
        self.mine = _share(list(shards.values()), worker, workers)

    @cached_property
    def pending(self) -> list[Shard]:
        """What of this process's share was not finished when this was first asked for; reads and verifies all that is."""
        return [shard for shard in self.mine if not self._is_finished(shard.name)]

    @property
    def kept(self) -> int:
        """How many of its shards were there."""
        return len(self.mine) - len(self.pending)

    @property
    def num_samples(self) -> int:
        """Samples that are to be embedded."""
        return sum(shard.samples for shard in self.pending)

    def run(
        self,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        advance: Callable[[int], None] | None = None,
        shards: Sequence[Shard] | None = None,
    ) -> list[Fault]:
        """Embed some shards, one after the other.

        Args:
            batch_size: Samples embedded at once; a batch does not reach over the end of a shard.
            num_workers: Loader processes.
            advance: Called with the number of samples done.
            shards: Which; the pending ones by default.

        Returns:
            The samples that could not be used; they are in the records too.
        """
        shards = self.pending if shards is None else shards
        if not shards:
            return []
        samples = Samples(replace(self.index, splits={"pending": [shard.name for shard in shards]}), "pending")
        plan = ShardPlan([samples.contents(list(self.encoders))], batch_size, seed=0, train=False)
        dataset = ShardDataset(samples, self.encoders, plan=plan, replace=True)
        batches = iter(make_loader(dataset, self.encoders, num_workers=num_workers))
        found: list[Fault] = []
        for shard in shards:
            faults: list[Fault] = []
            own = islice(batches, plan.batches_of(shard.samples))
            self._write(shard, self._embed(own, faults, advance) if shard.samples else self._nothing(), faults)
            found += faults
        return found

    def finish(self) -> Manifest | None:
        """Write the whole manifest, if the shards of all processes are finished; None if they are not."""
        records = [self._record(name) for name in self.source.shards]
        done = [record for record in records if record is not None and record.sizes_fit(self.out)]
        if len(done) < len(records):
            return None
        manifest = replace(Manifest.load(self.out), shards=done)
        if manifest != Manifest.load(self.out):
            manifest.save(self.out)
        _remove_abandoned(self.out / ROWS)
        return manifest

    def _prepare(self, manifest: Manifest) -> None:
        """Make the folder this job's, or see that it is already."""
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError("not a folder", where=self.out, fix="choose another --out")
        if not (self.out / NAME).exists():
            there = [path for path in self.out.iterdir() if path.suffix != PART] if self.out.exists() else []
            if there and not (self.out / NAME).exists():  # another process may have made it in the meantime
                raise ConfigError(
                    "the folder exists and holds no embeddings", where=self.out, fix="choose another --out"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            manifest.save(self.out)
        Manifest.load(self.out).source.check(self.source, self.out)
        if not (self.out / MODEL / "config.json").exists():
            self.model.save_pretrained(self.out / MODEL)

    def _is_finished(self, name: str) -> bool:
        record = self._record(name)
        return record is not None and record.digests_fit(self.out)

    def _record(self, name: str) -> ShardRecord | None:
        path = _record_path(self.out, name)
        if not path.is_file():
            return None
        try:
            record = parse_record(read_json(path))
        except (DataError, KeyError, TypeError, AttributeError):
            return None  # it is made anew
        return record if record.source == self.source.digest and record.name == name else None

    def _write(self, shard: Shard, rows: ShardRows, faults: Sequence[Fault]) -> None:
        path = rows_path(self.out, shard.name)
        _record_path(self.out, shard.name).unlink(missing_ok=True)
        files = FORMATS[self.source.file_format].write(path, rows)
        record = ShardRecord(
            name=shard.name,
            source=self.source.digest,
            rows=len(rows.keys),
            present={name: int(mask.sum()) for name, mask in rows.present.items()},
            files={file.relative_to(self.out).as_posix(): found for file, found in files.items()},
            faults=[
                {"key": fault.key, "modality": fault.modality, "reason": fault.reason, "detail": fault.detail}
                for fault in faults
            ],
        )
        write_json(_record_path(self.out, shard.name), asdict(record))

    def _embed(self, batches: Iterable[Batch], faults: list[Fault], advance: Callable[[int], None] | None) -> ShardRows:
        """The rows of the batches of one shard; its broken samples are added to ``faults``."""
        numbers: list[int] = []
        embeddings = embed_loader(self.model, _noting(batches, numbers, faults, advance))
        return ShardRows(
            embeddings.keys,
            numbers,
            {name: rows.numpy() for name, rows in embeddings.rows.items()},
            {name: mask.numpy() for name, mask in embeddings.present.items()},
            {name: embeddings.labels[content_label(name)].numpy() for name in embeddings.rows},
        )

    def _nothing(self) -> ShardRows:
        rows = {name: np.zeros((0, self.model.embed_dim), np.float32) for name in self.encoders}
        contents = {name: np.zeros(0, np.int64) for name in rows}
        return ShardRows([], [], rows, {name: np.zeros(0, bool) for name in rows}, contents)


def _share(shards: Sequence[Shard], worker: int, workers: int) -> list[Shard]:
    """This process's shards, in order. They are dealt in an order that depends on the number of processes: what one process
    left when it died falls to all of them when the job is started again with another number."""
    dealt = sorted(shards, key=lambda shard: stable_hash(f"{workers} {shard.name}"))
    own = {shard.name for shard in dealt[worker::workers]}
    return [shard for shard in shards if shard.name in own]


def _remove_abandoned(folder: Path) -> None:
    for place, folders, files in os.walk(folder):  # what others take away meanwhile, it passes over
        for left in (Path(place) / name for name in [*folders, *files] if name.endswith(PART)):
            with suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def rows_path(folder: Path, shard: str) -> Path:
    """Where the rows of a shard are, without a suffix."""
    return folder / ROWS / shard.removesuffix(".tar")


def _record_path(folder: Path, shard: str) -> Path:
    return folder / ROWS / f"{shard.removesuffix('.tar')}.json"


def _known(chosen: Sequence[str] | None, model: MultimodalModel) -> list[str]:
    for name in chosen or ():
        if name not in model.modalities:
            raise MmrepError(f"the model has no modality '{name}'", fix=did_you_mean(name, model.modalities))
    return [name for name in model.modalities if chosen is None or name in chosen]


def _noting(
    batches: Iterable[Batch], numbers: list[int], faults: list[Fault], advance: Callable[[int], None] | None
) -> Iterator[Batch]:
    """Batches of one shard in order; the numbers of their samples and the faults are noted in passing."""
    first = 0
    for batch in batches:
        found = [first + place for place, key in enumerate(batch.keys) if key]
        numbers += found
        faults += batch.faults
        first += len(batch)
        yield batch
        if advance is not None:
            advance(len(found) + len(batch.faults))  # not the padding of the last batch
