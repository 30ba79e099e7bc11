"""`ShardDataset`: the samples of a split, decoded and transformed; and the loader over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmrep.batch import Batch, Input
from mmrep.data.collate import Collate, Sample
from mmrep.data.decode import decode
from mmrep.data.faults import MOST_IN_A_ROW
from mmrep.data.index import Index
from mmrep.data.plan import PADDING, Plan, PlannedBatch, PlanSampler, from_the_start
from mmrep.data.prefetch import Prefetcher
from mmrep.data.reader import Samples, Stored, Where
from mmrep.data.worker_signals import blocked, leave_signals_to_the_parent
from mmrep.errors import ConfigError, DataError, Fault, MmrepError, SampleError, did_you_mean
from mmrep.stable_hash import stable_hash

GROUP = "@group"
"""The label that holds a digest of the index's group key; the @ keeps it apart from fields of the user's JSON."""


class Preprocessor(Protocol):
    """What the data layer asks of an encoder."""

    @property
    def kind(self) -> str: ...

    def preprocess(self, train: bool) -> Callable[[Any], Input]: ...

    def blank(self, train: bool) -> Input: ...


class ShardDataset(Dataset[Any]):
    """Reads, decodes and transforms the samples of a `PlannedBatch`.

    In training the random numbers of a sample's augmentation depend on (seed, cycle, sample) alone: neither on the
    worker nor on what was loaded before.

    Args:
        parts: The samples, of one dataset or of several that are blended.
        encoders: Modality -> what prepares it.
        plan: Of the batches; made of the parts by default.
        train: Whether transforms may be random. Outside training, samples also carry digests of their contents.
        seed: Of the order and of the augmentation.
        replace: Whether a faulty sample is replaced by the next planned spare (in training) or left out (in evaluation),
            and reported with the batch. By default it is an error: figures are of all samples, or of none.
    """

    def __init__(
        self,
        parts: Samples | Sequence[Samples],
        encoders: Mapping[str, Preprocessor],
        *,
        plan: Plan | None = None,
        global_batch_size: int = 1,
        train: bool = False,
        seed: int = 0,
        replace: bool = False,
    ) -> None:
        self.parts = [parts] if isinstance(parts, Samples) else list(parts)
        check_modalities([samples.index for samples in self.parts], encoders)
        self.train, self.seed, self.replace = train, seed, replace
        self.transforms = {name: encoder.preprocess(train) for name, encoder in encoders.items()}
        self.plan = plan or Plan(
            [samples.contents(list(encoders)) for samples in self.parts], global_batch_size, seed, train
        )
        self.classes = _shared_classes([samples.index for samples in self.parts])
        self.prefetcher = Prefetcher(self.parts)
        self._wanted = [_wanted(samples, list(encoders)) for samples in self.parts]

    @property
    def label_names(self) -> list[str]:
        contents = [] if self.train else [content_label(name) for name in self.transforms]
        group = [GROUP] if any(samples.index.group_key for samples in self.parts) else []
        return [*group, *self.classes, *contents]

    def __len__(self) -> int:
        return sum(len(samples) for samples in self.parts)

    def __getitem__(self, number: int) -> Sample:
        """A sample of the first part by its number, in its first pass."""
        return self.load(0, 0, number)

    def __getitems__(self, batch: PlannedBatch) -> list[Sample] | MmrepError:
        """The samples of a batch; an error is handed over, so that it arrives as it is and not as a worker's traceback."""
        try:
            return self._load_batch(batch)
        except MmrepError as error:
            return error

    def load(self, part: int, cycle: int, number: int) -> Sample:
        """One sample.

        Args:
            part: Of which dataset.
            cycle: In which pass over it: decides on the augmentation.
            number: Which.

        Raises:
            SampleError: If its contents cannot be used.
        """
        columns, names = self._wanted[part]
        return self._prepare(part, cycle, number, names, self.parts[part].read_many(np.array([number]), columns)[0])

    def _load_batch(self, batch: PlannedBatch) -> list[Sample]:
        self.prefetcher.look_ahead(self.plan, batch)
        samples = [Sample(key="") for _ in range(len(batch))]
        for part, source in enumerate(self.parts):
            (slots,) = ((batch.parts == part) & (batch.samples != PADDING)).nonzero()
            columns, names = self._wanted[part]
            stored = source.read_many(batch.samples[slots], columns)
            for slot, members in zip(slots.tolist(), stored, strict=True):
                cycle, number = int(batch.cycles[slot]), int(batch.samples[slot])
                try:
                    samples[slot] = self._prepare(part, cycle, number, names, members)
                except SampleError as error:
                    if not self.replace:
                        raise
                    samples[slot] = self._replacement(batch, slot, part, cycle, number, error)
        return samples

    def _replacement(
        self, batch: PlannedBatch, slot: int, part: int, cycle: int, number: int, error: SampleError
    ) -> Sample:
        """What stands in for a faulty sample: the first spare that is whole; in evaluation no sample at all."""
        faults = [self._fault(part, number, error)]
        if not self.train:
            return Sample(key="", faults=faults)
        for spare in self.plan.spares(batch.epoch, batch.number, batch.first + slot):
            try:
                sample = self.load(part, cycle, spare)
                sample.faults = faults
                return sample
            except SampleError as another:
                faults.append(self._fault(part, spare, another))
                if len(faults) >= MOST_IN_A_ROW:
                    break
        raise DataError(
            f"a faulty sample has no spare: {len(faults)} in a row cannot be used, the first: {error.what}",
            where=error.where,
            fix="check the shards: mmrep data check",
        )

    def _fault(self, part: int, number: int, error: SampleError) -> Fault:
        samples = self.parts[part]
        shard = samples.shard(number)
        return Fault(shard.name, shard.sha256, samples.key(number), error.modality, error.reason, error.what)

    def _prepare(
        self, part: int, cycle: int, number: int, names: Sequence[str | None], members: Sequence[Stored]
    ) -> Sample:
        samples = self.parts[part]
        sample = Sample(key=samples.key(number))
        with torch.random.fork_rng(devices=[], enabled=self.train):
            if self.train:
                # torch.manual_seed would seed every device too, which costs more than decoding a small picture
                torch.default_generator.manual_seed(stable_hash(f"{self.seed} {part} {cycle} {number}"))
            for name, stored in zip(names, members, strict=True):
                if stored is None:
                    continue
                try:
                    if isinstance(stored, SampleError):
                        raise stored
                    if name is None:
                        sample.labels |= self._labels(part, number, stored[1])
                    else:
                        self._fill(sample, samples, number, name, *stored)
                except SampleError as error:
                    error.modality = name or "json"
                    raise
        return sample

    def _fill(self, sample: Sample, samples: Samples, number: int, modality: str, extension: str, data: bytes) -> None:
        try:
            raw = decode(samples.index.modalities[modality].kind, extension, data, Where(samples, number))
            sample.values[modality] = self.transforms[modality](raw)
        except Exception as error:
            if isinstance(error, MmrepError):  # of which only one line is printed, without notes
                error.happened_at(samples.where(number))
            error.add_note(f"while preparing '{modality}' of {samples.where(number)}")
            raise
        if not self.train:
            sample.labels[content_label(modality)] = stable_hash(data)

    def _labels(self, part: int, number: int, data: bytes) -> dict[str, int]:
        samples = self.parts[part]
        record = decode("json", "json", data, Where(samples, number))
        if not isinstance(record, dict):
            raise SampleError("the json is no object", where=Where(samples, number))
        labels, key = {}, samples.index.group_key
        if key and record.get(key) is not None:
            prefix = f"{part} " if part else ""  # equal values of two datasets need not mean the same
            labels[GROUP] = stable_hash(f"{prefix}{record[key]}")
        for name in samples.index.labels.keys() & self.classes.keys():
            labels[name] = self.classes[name].number(record.get(name), Where(samples, number))
        return labels


def _wanted(samples: Samples, modalities: Sequence[str]) -> tuple[list[list[int]], list[str | None]]:
    """What to read of each sample: columns, and the modality that they carry; None for the JSON of the labels."""
    names: list[str | None] = [name for name in modalities if name in samples.index.modalities]
    columns = [samples.columns(str(name)) for name in names]
    index = samples.index
    if (index.group_key or index.labels) and "json" in index.extensions:
        columns.append([index.extensions.index("json")])
        names.append(None)
    return columns, names


class _Classes:
    """The classes of a label, by name; a list may name two classes alike ("crane" is a bird and a machine).

    Args:
        label: Of the samples' JSON.
        names: Of the classes, in order.
    """

    def __init__(self, label: str, names: Sequence[str]) -> None:
        self.label, self.count = label, len(names)
        self.numbers = {name: number for number, name in enumerate(names)}
        self.ambiguous = {name for name, times in Counter(names).items() if times > 1}

    def number(self, value: Any, where: object) -> int:
        """The number of a class that the JSON gives by name or by number; -1 for none of them.

        A number that is itself the name of a class ("10" of "1", "10", "2") is a name.

        Raises:
            DataError: If the name is that of several classes.
        """
        name = str(value)
        if name in self.ambiguous:
            raise DataError(
                f"label '{self.label}' is '{name}', the name of several classes",
                where=where,
                fix="give the classes distinct names, or label the samples by number",
            )
        if name in self.numbers:
            return self.numbers[name]
        return value if isinstance(value, int) and 0 <= value < self.count else -1


def _shared_classes(indexes: Sequence[Index]) -> dict[str, _Classes]:
    """The classes of each label; a label to which two datasets give different classes is none."""
    listed: dict[str, list[list[str]]] = {}
    for index in indexes:
        for name, label in index.labels.items():
            listed.setdefault(name, []).append(label.classes)
    return {
        name: _Classes(name, classes[0])
        for name, classes in listed.items()
        if all(other == classes[0] for other in classes)
    }


def content_label(modality: str) -> str:
    """The label that holds a digest of a modality's bytes: equal contents are one item of a gallery."""
    return f"@content:{modality}"


def check_modalities(indexes: Sequence[Index], encoders: Mapping[str, Preprocessor]) -> None:
    """Refuse encoders that the shards cannot feed.

    Raises:
        ConfigError: If a modality is in no index, or its kind is not the encoder's.
    """
    for name, encoder in encoders.items():
        having = [index for index in indexes if name in index.modalities]
        if not having:
            known = [modality for index in indexes for modality in index.modalities]
            raise ConfigError(
                f"the shards have no modality '{name}'", where=indexes[0].root, fix=did_you_mean(name, known)
            )
        for index in having:
            if (kind := index.modalities[name].kind) != encoder.kind:
                raise ConfigError(
                    f"modality '{name}' is {kind}, its encoder {type(encoder).__name__} takes {encoder.kind}",
                    where=index.root,
                )


class ShardLoader(DataLoader[Batch]):
    """A DataLoader of `Batch` es that raises what a worker met as the error it was, and whose workers no signal ends.

    It is stateful in name only: the place in the stream is the data module's, equal on all ranks.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # DataLoader declares its private iterator
        for batch in super().__iter__():
            if isinstance(batch, MmrepError):
                raise batch
            yield batch

    def _get_iterator(self) -> Any:
        """Where torch starts the workers."""
        given = self.worker_init_fn  # Lightning's, which seeds them by rank
        self.worker_init_fn = partial(leave_signals_to_the_parent, given)
        try:
            with blocked():
                return super()._get_iterator()
        finally:
            self.worker_init_fn = given

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _CollateOrError(Collate):
    """Lets an error through, which arrives in place of samples."""

    def __call__(self, samples: Sequence[Sample] | MmrepError) -> Batch | MmrepError:  # type: ignore[override]  # widened
        return samples if isinstance(samples, MmrepError) else super().__call__(samples)


def make_loader(
    dataset: ShardDataset,
    encoders: Mapping[str, Preprocessor],
    *,
    num_workers: int = 0,
    position: Callable[[], tuple[int, int]] = from_the_start,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> ShardLoader:
    """A sized loader of this rank's `Batch` es, in the order of the plan."""
    blanks = {name: encoder.blank(dataset.train) for name, encoder in encoders.items()}
    return ShardLoader(
        dataset,
        # One object in place of a list of numbers: the dataset reads a batch at a time.
        batch_sampler=PlanSampler(dataset.plan, position, rank, world),  # type: ignore[arg-type]  # for that reason
        num_workers=num_workers,
        collate_fn=_CollateOrError(blanks, dataset.label_names),
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )
