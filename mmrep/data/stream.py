"""`Stream`: training from shards that cannot be indexed (a server without ranges, a live export), by WebDataset's stages.

It gives up what an index gives:

- No exact epoch. An epoch is so many batches. Each loader worker of each rank goes through all shards in an order of its own:
  samples are drawn with replacement, and one may come twice in an epoch, or in a batch, and another not at all.
- No exact resume inside an epoch: the rest of it is drawn anew.
- The order depends on the numbers of ranks and workers; with the same numbers and seed it is the same.
- No checksums: bytes that changed on the way are noticed only where they break a header or a decoder.
- No labels, no evaluation: validate on an indexed folder.

What holds as everywhere: members of two samples are never paired, nothing is executed, and damage is one clear error.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from mmrep.batch import Batch
from mmrep.data.collate import Collate, Sample
from mmrep.data.dataset import Preprocessor, ShardLoader
from mmrep.data.decode import decode
from mmrep.data.faults import MOST_IN_A_ROW
from mmrep.data.index import Modality, kind_of
from mmrep.data.locations import find_shards, join
from mmrep.data.order import permutation
from mmrep.data.plan import from_the_start
from mmrep.data.tar_stream import read_shard
from mmrep.errors import ConfigError, DataError, Fault, MmrepError, SampleError, did_you_mean
from mmrep.stable_hash import stable_hash


@dataclass(frozen=True)
class Stream:
    """How to train from shards without an index.

    Attributes:
        modalities: Name -> extensions of the members that may carry it, the preferred first.
        batches_per_epoch: Global batches that make an epoch.
        shuffle_buffer: Stored samples that each worker holds to draw from; keep it well below the samples of all shards, lest
            one sample be in it many times.
    """

    modalities: dict[str, list[str]]
    batches_per_epoch: int
    shuffle_buffer: int = 1000

    def __post_init__(self) -> None:
        if self.batches_per_epoch < 1 or self.shuffle_buffer < 1:
            raise ConfigError(
                f"batches_per_epoch={self.batches_per_epoch}, shuffle_buffer={self.shuffle_buffer}", where="data.stream"
            )
        self.stored()

    def stored(self) -> dict[str, Modality]:
        """The modalities, each with its kind."""
        if without := [name for name, extensions in self.modalities.items() if not extensions]:
            raise ConfigError(f"modality '{without[0]}' has no extensions", where="data.stream.modalities")
        return {name: Modality(tuple(e), kind_of(e[0])) for name, e in self.modalities.items()}


class StreamDataset(IterableDataset[Any]):
    """A rank's collated `Batch` es of an epoch: always the same number, whatever the shards hold.

    Args:
        place: Folder, pattern or URL of the shards.
        stream: How to read them.
        encoders: Modality -> what prepares it.
        global_batch_size: Samples of a step over all ranks together.
        seed: Of the order and of the augmentation.
        rank: Of this process.
        world: Number of processes.

    Attributes:
        epoch, first: The epoch, and the batch of it, that the next pass begins with.

    Raises:
        MmrepError: If there are no shards, or they cannot feed the encoders.
    """

    def __init__(
        self,
        place: str,
        stream: Stream,
        encoders: Mapping[str, Preprocessor],
        *,
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if global_batch_size % world:
            raise ConfigError(
                f"a global batch of {global_batch_size} cannot be shared by {world} ranks",
                where="data.global_batch_size",
            )
        self.shards, self.stream, self.seed, self.rank = find_shards(place), stream, seed, rank
        self.batch_size = global_batch_size // world
        self.modalities = _checked(stream.stored(), encoders)
        self.transforms = {name: encoder.preprocess(True) for name, encoder in encoders.items()}
        self.collate = Collate({name: encoder.blank(True) for name, encoder in encoders.items()}, ())
        self.epoch, self.first = from_the_start()

    def __len__(self) -> int:
        return self.stream.batches_per_epoch

    def __iter__(self) -> Iterator[Batch | MmrepError]:
        """The batches of this worker; an error is handed over, so that it arrives as it is and not as a traceback."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples = self._samples(worker)
        try:
            for _ in range(worker, len(self) - self.first, workers):
                yield self.collate(list(itertools.islice(samples, self.batch_size)))
        except MmrepError as error:
            yield error

    def _samples(self, worker: int) -> Iterator[Sample]:
        """Samples without end; each carries the faults of those that were skipped before it."""
        draw = f"{self.seed} {self.epoch} {self.first} {self.rank} {worker}"
        faults: list[Fault] = []
        # Stored samples are shuffled, not decoded ones: those are many times larger.
        shuffled = shuffle(self.stream.shuffle_buffer, rng=random.Random(draw))(self._stored(draw))
        for number, stored in enumerate(shuffled):
            try:
                sample = self._prepare(stored, f"{draw} {number}")
            except SampleError as error:
                faults.append(Fault(stored["__url__"], "", stored["__key__"], error.modality, error.reason, error.what))
                if len(faults) > MOST_IN_A_ROW:
                    raise DataError(
                        f"{len(faults)} samples in a row cannot be used, the last: {error.what}",
                        where=f"{stored['__url__']}:{stored['__key__']}",
                        fix="check data.stream.modalities and the shards",
                    ) from error
                continue
            sample.faults, faults = faults, []
            yield sample

    def _stored(self, draw: str) -> Iterator[dict[str, Any]]:
        """Samples as they are stored, shard after shard, in ever new orders of the shards."""
        names = self.shards.names
        extensions = frozenset(itertools.chain(*(modality.extensions for modality in self.modalities.values())))
        for cycle in itertools.count():
            usable = False
            for shard in permutation(len(names), draw, cycle).tolist():
                for stored in read_shard(join(self.shards.root, names[shard]), names[shard], extensions):
                    if not extensions.isdisjoint(stored):
                        usable = True
                        yield stored
            if not usable:
                raise DataError(
                    f"no sample of {len(names)} shards has a member {', '.join(f'.{e}' for e in sorted(extensions))}",
                    where=self.shards.root,
                    fix="check data.stream.modalities",
                )

    def _prepare(self, stored: Mapping[str, Any], randomness: str) -> Sample:
        sample = Sample(key=stored["__key__"])
        where = f"{stored['__url__']}:{sample.key}"
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stable_hash(randomness))
            for name, modality in self.modalities.items():
                extension = next((extension for extension in modality.extensions if extension in stored), None)
                if extension is None:
                    continue
                try:
                    if isinstance(data := stored[extension], SampleError):
                        raise data
                    sample.values[name] = self.transforms[name](decode(modality.kind, extension, data, where))
                except SampleError as error:
                    error.modality = name
                    raise
                except Exception as error:
                    if isinstance(error, MmrepError):  # of which only one line is printed, without notes
                        error.happened_at(where)
                    error.add_note(f"while preparing '{name}' of {where}")
                    raise
        return sample


class StreamLoader(ShardLoader):
    """The loader over a `StreamDataset`.

    Args:
        dataset: Of the samples.
        num_workers: Processes that share the batches.
        position: Asked at the start of each pass: the epoch, and the batch of it to begin with.
        pin_memory: As torch's.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        num_workers: int = 0,
        position: Callable[[], tuple[int, int]] = from_the_start,
        pin_memory: bool = False,
    ) -> None:
        # Workers begin anew with each pass, with a copy of the dataset that knows where it begins.
        super().__init__(dataset, batch_size=None, num_workers=num_workers, pin_memory=pin_memory)
        self.position = position

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # as ShardLoader
        assert isinstance(self.dataset, StreamDataset)
        self.dataset.epoch, self.dataset.first = self.position()
        yield from super().__iter__()


def _checked(modalities: Mapping[str, Modality], encoders: Mapping[str, Preprocessor]) -> dict[str, Modality]:
    """The modalities of the encoders."""
    for name, encoder in encoders.items():
        if name not in modalities:
            raise ConfigError(
                f"the stream has no modality '{name}'",
                where="data.stream.modalities",
                fix=did_you_mean(name, modalities),
            )
        if (kind := modalities[name].kind) != encoder.kind:
            raise ConfigError(
                f"modality '{name}' is {kind}, its encoder {type(encoder).__name__} takes {encoder.kind}",
                where="data.stream.modalities",
            )
    return {name: modalities[name] for name in encoders}
