"""`ShardDataset`: the samples of a split, decoded and transformed; and the loader over it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from mmrep.batch import Batch, Input
from mmrep.data.collate import Collate, Sample
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.plan import PADDING, Plan, PlanSampler
from mmrep.data.reader import Samples
from mmrep.errors import ConfigError, DataError, did_you_mean

GROUP = "@group"
"""The label that holds a digest of the index's group key; the @ keeps it apart from fields of the user's JSON."""


class Preprocessor(Protocol):
    """What the data layer asks of an encoder."""

    @property
    def kind(self) -> str: ...

    def preprocess(self, train: bool) -> Callable[[Any], Input]: ...

    def blank(self, train: bool) -> Input: ...


class ShardDataset(Dataset[Any]):
    """Reads, decodes and transforms samples of a split by ``(epoch, number)``.

    In training the random numbers of a sample's augmentation depend on (seed, epoch, number) alone: neither on the
    worker nor on what was loaded before.

    Args:
        samples: The samples' bytes.
        encoders: Modality -> what prepares it.
        train: Whether transforms may be random. Outside training, samples also carry digests of their contents.
        seed: Of the augmentation.
    """

    def __init__(self, samples: Samples, encoders: Mapping[str, Preprocessor], *, train: bool, seed: int) -> None:
        check_modalities(samples.index, encoders)
        self.samples, self.train, self.seed = samples, train, seed
        self.transforms = {name: encoder.preprocess(train) for name, encoder in encoders.items()}
        self.classes = {
            name: {value: number for number, value in enumerate(label.classes)}
            for name, label in samples.index.labels.items()
        }

    @property
    def label_names(self) -> list[str]:
        contents = [] if self.train else [content_label(name) for name in self.transforms]
        group = [GROUP] if self.samples.index.group_key else []
        return [*group, *self.classes, *contents]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, number = place
        if number == PADDING:
            return Sample(key="")
        sample = Sample(key=self.samples.locations[number].key, labels=self._labels(number))
        with torch.random.fork_rng(devices=[], enabled=self.train):
            if self.train:
                # torch.manual_seed would seed every device too, which costs more than decoding a small picture
                torch.default_generator.manual_seed(_digest(f"{self.seed} {epoch} {number}".encode()))
            for modality in self.transforms:
                self._fill(sample, number, modality)
        return sample

    def _fill(self, sample: Sample, number: int, modality: str) -> None:
        extension = self.samples.extension_of(number, modality)
        if extension is None:
            return
        data = self.samples.read(number, extension)
        kind = self.samples.index.modalities[modality].kind
        sample.values[modality] = self.transforms[modality](
            decode(kind, extension, data, self.samples.locations[number])
        )
        if not self.train:
            sample.labels[content_label(modality)] = _digest(data)

    def _labels(self, number: int) -> dict[str, int]:
        key = self.samples.index.group_key
        if "json" not in self.samples.locations[number].members or not (key or self.classes):
            return {}
        record = decode("json", "json", self.samples.read(number, "json"), self.samples.locations[number])
        if not isinstance(record, dict):
            raise DataError("the json is no object", where=self.samples.locations[number])
        labels = {}
        if key and record.get(key) is not None:
            labels[GROUP] = _digest(str(record[key]).encode())
        for name, classes in self.classes.items():
            labels[name] = _class_number(record.get(name), classes)
        return labels


def _class_number(value: Any, classes: Mapping[str, int]) -> int:
    """The number of a class that the JSON gives by name or by number; -1 for none of them.

    A number that is itself the name of a class ("10" of "1", "10", "2") is a name.
    """
    if str(value) in classes:
        return classes[str(value)]
    return value if isinstance(value, int) and 0 <= value < len(classes) else -1


def content_label(modality: str) -> str:
    """The label that holds a digest of a modality's bytes: equal contents are one item of a gallery."""
    return f"@content:{modality}"


def check_modalities(index: Index, encoders: Mapping[str, Preprocessor]) -> None:
    """Refuse encoders that the shards cannot feed.

    Raises:
        ConfigError: If a modality is not in the index, or its kind is not the encoder's.
    """
    for name, encoder in encoders.items():
        if name not in index.modalities:
            raise ConfigError(
                f"the shards have no modality '{name}'", where=index.folder, fix=did_you_mean(name, index.modalities)
            )
        if (kind := index.modalities[name].kind) != encoder.kind:
            raise ConfigError(
                f"modality '{name}' is {kind}, its encoder {type(encoder).__name__} takes {encoder.kind}",
                where=index.folder,
            )


def make_loader(
    dataset: ShardDataset,
    encoders: Mapping[str, Preprocessor],
    global_batch_size: int,
    *,
    num_workers: int = 0,
    epoch: Callable[[], int] = lambda: 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """A sized loader of this rank's `Batch` es, in the order of the plan."""
    plan = Plan(len(dataset), global_batch_size, dataset.seed, dataset.train)
    blanks = {name: encoder.blank(dataset.train) for name, encoder in encoders.items()}
    return DataLoader(
        dataset,
        batch_sampler=PlanSampler(plan, epoch, rank, world),
        num_workers=num_workers,
        collate_fn=Collate(blanks, dataset.label_names),
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
    )


def _digest(data: bytes) -> int:
    """A stable non-negative 63-bit number (Python's own hash differs between processes)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
