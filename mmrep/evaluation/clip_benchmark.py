"""CLIP_benchmark's folders: pictures with a class, several classes or several captions, in plain tars without an index.

::

    DIR/
      dataset_type.txt                         retrieval or multilabel; without it, classification
      classnames.txt                           a line each; the line's number is the class
      zeroshot_classification_templates.txt    a line each, with {c}; or JSON {class: [prompt, ...]}
      SPLIT/nshards.txt                        how many tars there are: SPLIT/0.tar, SPLIT/1.tar, ...

A sample is a picture (webp, png, jpg or jpeg) and ``cls`` (its class as a number), ``npy`` (0 or 1 for every class) or ``txt``
(its captions, a line each). Tars are walked by their headers, strictly; nothing of them is unpickled or run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mmrep.batch import Batch
from mmrep.data.collate import Collate, Sample
from mmrep.data.dataset import GROUP, Preprocessor, ShardLoader
from mmrep.data.decode import MAX_BYTES, decode
from mmrep.data.order import Contents
from mmrep.data.plan import PADDING, Plan, PlannedBatch, PlanSampler
from mmrep.data.scan import group_members
from mmrep.data.tar import Member
from mmrep.errors import DataError, MmrepError, did_you_mean
from mmrep.evaluation.prompts import Templates, as_templates, read_classnames, read_names_or_json

CLASSIFICATION, MULTILABEL, RETRIEVAL = TYPES = ("classification", "multilabel", "retrieval")
PICTURES = ("webp", "png", "jpg", "jpeg")
"""In the order in which CLIP_benchmark looks for them."""
LABEL = "class"
"""The label of a batch that holds the class."""
NSHARDS = "nshards.txt"
MOST_SHARDS = 1_000_000
MOST_CLS_BYTES = 64
MOST_CAPTIONS = 1000
"""Of a picture. Each is a row with room for a picture in the batch: 150 MB then, at 224 x 224."""


def target_label(number: int) -> str:
    """The label of a batch that says whether a picture has a class, 0 or 1, where it may have several."""
    return f"{LABEL}:{number}"


@dataclass(frozen=True)
class ClipBenchmark:
    """A folder of CLIP_benchmark's.

    Attributes:
        folder: Where it is.
        kind: ``classification``, ``multilabel`` or ``retrieval``.
        classes: Names of the classes; empty where the folder has none.
        templates: Of the prompts; empty where the folder has none.
    """

    folder: Path
    kind: str
    classes: list[str]
    templates: Templates

    @classmethod
    def found_in(cls, folder: Path | str) -> bool:
        """Whether a folder is of this layout: no index.json, and a split with nshards.txt."""
        folder = Path(folder)
        return not (folder / "index.json").is_file() and any(folder.glob(f"*/{NSHARDS}"))

    @classmethod
    def load(cls, folder: Path | str) -> ClipBenchmark:
        """Read what the folder says of itself.

        Raises:
            MmrepError: If one of its files is broken.
        """
        folder = Path(folder)
        kind, classes = CLASSIFICATION, list[str]()
        if (folder / "dataset_type.txt").is_file():
            kind = " ".join(map(str, read_names_or_json(folder / "dataset_type.txt"))).strip().lower()[:40]
        if kind not in TYPES:
            raise DataError(f"a data set of type '{kind}'", where=folder, fix=did_you_mean(kind, TYPES))
        if (folder / "classnames.txt").is_file():
            classes = read_classnames(folder / "classnames.txt", [])
        templates: Templates = []
        if (path := folder / "zeroshot_classification_templates.txt").is_file():
            templates = as_templates(read_names_or_json(path), classes, [folder.name], path)
        return cls(folder, kind, classes, templates)

    def shards(self, split: str) -> list[Path]:
        """The tars of a split, in order.

        Raises:
            DataError: If there is no such split, or a tar is missing.
        """
        path = self.folder / split / NSHARDS
        if not path.is_file():
            splits = sorted(file.parent.name for file in self.folder.glob(f"*/{NSHARDS}"))
            raise DataError(f"no split '{split}'", where=self.folder, fix=did_you_mean(split, splits))
        text = path.read_text(encoding="utf-8", errors="replace")[:40].strip()
        if not text.isdecimal() or not 0 < int(text) <= MOST_SHARDS:
            raise DataError(f"'{text}' is no number of shards", where=path)
        shards = [self.folder / split / f"{number}.tar" for number in range(int(text))]
        if missing := [shard for shard in shards if not shard.is_file()]:
            raise DataError(f"{len(missing)} of {len(shards)} shards are missing", where=missing[0])
        return shards


@dataclass(frozen=True)
class _Record:
    """A sample as it is stored: its shard, its key, and where its members lie."""

    shard: Path
    key: str
    members: Mapping[str, Member]

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}"

    def first(self, extensions: Sequence[str]) -> str:
        """The first of some extensions that it has.

        Raises:
            DataError: If it has none.
        """
        found = next((extension for extension in extensions if extension in self.members), None)
        if found is None:
            raise DataError(f"a sample without .{' or .'.join(extensions)}", where=self)
        return found

    def read(self, extension: str, most: int) -> bytes:
        """The bytes of a member.

        Raises:
            DataError: If they are too many.
        """
        member = self.members[extension]
        if member.size > most:
            raise DataError(f"member .{extension} has {member.size} bytes, more than {most}", where=self)
        with self.shard.open("rb") as file:
            file.seek(member.offset)
            return file.read(member.size)


class ClipBenchmarkDataset(Dataset[Any]):
    """The samples of a split, as batches of a `Plan`, each once and in order.

    A sample of a retrieval set becomes as many rows as it has captions: the first with the picture, the others with a caption
    alone, all of one group. Searching pictures by captions, every caption asks; searching captions by pictures, all
    captions are candidates and those of the picture's group are right.

    Args:
        source: The folder.
        split: Which split.
        encoders: Modality -> encoder, one of kind ``image``, and in retrieval one of kind ``text``.
        global_batch_size: Samples of a batch over all ranks together.
    """

    def __init__(
        self, source: ClipBenchmark, split: str, encoders: Mapping[str, Preprocessor], global_batch_size: int
    ) -> None:
        self.source = source
        self.picture, self.caption = _modalities(source, encoders)
        self.transforms = {name: encoder.preprocess(False) for name, encoder in encoders.items()}
        self.records = [
            _Record(shard, key, members) for shard in source.shards(split) for key, members in group_members(shard)
        ]
        self.plan = Plan([Contents.uniform([len(self.records)])], global_batch_size, 0, train=False)
        blanks = {name: encoder.blank(False) for name, encoder in encoders.items()}
        self.collate = Collate(blanks, self.label_names)

    @cached_property
    def label_names(self) -> list[str]:
        if self.source.kind == MULTILABEL:
            return [target_label(number) for number in range(len(self.source.classes))]
        return [GROUP] if self.source.kind == RETRIEVAL else [LABEL]

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, planned: PlannedBatch) -> Batch | MmrepError:
        """A batch; an error is handed over, so that it arrives as it is and not as a worker's traceback."""
        try:
            rows = [self._rows(int(n)) if n != PADDING else [Sample(key="")] for n in planned.samples]
            return self.collate([row for some in rows for row in some])
        except MmrepError as error:
            return error

    def _rows(self, number: int) -> list[Sample]:
        record = self.records[number]
        extension = record.first(PICTURES)
        raw = decode("image", extension, record.read(extension, MAX_BYTES["image"]), record)
        first = Sample(record.key, {self.picture: self.transforms[self.picture](raw)})
        if self.source.kind == RETRIEVAL:
            return self._with_captions(first, record, number)
        first.labels = self._classes(record)
        return [first]

    def _with_captions(self, first: Sample, record: _Record, number: int) -> list[Sample]:
        text = decode("text", "txt", record.read(record.first(["txt"]), MAX_BYTES["text"]), record)
        captions = text.splitlines()  # an empty line is a caption: CLIP_benchmark counts it too
        if len(captions) > MOST_CAPTIONS:
            raise DataError(f"{len(captions)} captions of a picture, more than {MOST_CAPTIONS}", where=record)
        rows = [first]
        for place, caption in enumerate(captions):
            if place:
                rows.append(Sample(f"{record.key}#{place}"))
            rows[-1].values[self.caption] = self.transforms[self.caption](caption)
        for row in rows:
            row.labels[GROUP] = number
        return rows

    def _classes(self, record: _Record) -> dict[str, int]:
        known = len(self.source.classes)
        if self.source.kind == MULTILABEL:
            array = decode("array", "npy", record.read(record.first(["npy"]), MAX_BYTES["array"]), record)
            if array.shape != (known,) or not np.isin(array, (0, 1)).all():
                raise DataError(f"the labels are no {known} zeros and ones", where=record)
            return {target_label(number): int(value) for number, value in enumerate(array)}
        text = record.read(record.first(["cls"]), MOST_CLS_BYTES).decode(errors="replace").strip()
        if not text.isdecimal() or int(text) >= known:
            raise DataError(f"'{text}' is no class from 0 to {known - 1}", where=record)
        return {LABEL: int(text)}


def clip_benchmark_loader(
    dataset: ClipBenchmarkDataset, *, num_workers: int = 0, rank: int = 0, world: int = 1
) -> ShardLoader:
    """A loader of this rank's share of every batch."""
    return ShardLoader(
        dataset,
        batch_sampler=PlanSampler(dataset.plan, rank=rank, world=world),  # type: ignore[arg-type]  # a batch at a time
        num_workers=num_workers,
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _modalities(source: ClipBenchmark, encoders: Mapping[str, Preprocessor]) -> tuple[str, str]:
    """The modalities that take pictures and captions; captions are asked for in retrieval only."""
    by_kind = {encoder.kind: name for name, encoder in encoders.items()}
    kinds = ("image", "text") if source.kind == RETRIEVAL else ("image",)
    if set(by_kind) != set(kinds) or len(encoders) != len(kinds):
        raise DataError(
            f"a data set of type {source.kind} feeds one encoder of each kind of {', '.join(kinds)}, not "
            f"{ {name: encoder.kind for name, encoder in encoders.items()} }",
            where=source.folder,
        )
    return by_kind["image"], by_kind.get("text", "")
