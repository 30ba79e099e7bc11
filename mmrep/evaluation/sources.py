"""What can be evaluated on: our indexed shards, or a folder of CLIP_benchmark's; the folder says which it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmrep.batch import Batch
from mmrep.data.dataset import Preprocessor, ShardDataset, make_loader
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.data.shard_cache import ShardCache
from mmrep.errors import ConfigError
from mmrep.evaluation.clip_benchmark import (
    LABEL,
    MULTILABEL,
    RETRIEVAL,
    ClipBenchmark,
    ClipBenchmarkDataset,
    clip_benchmark_loader,
    target_label,
)
from mmrep.evaluation.prompts import Templates, only_of, prompts_of, read_classnames, read_templates, shipped_templates
from mmrep.evaluation.templates import TEMPLATES

Source = Index | ClipBenchmark


def open_source(data: Path | str, cache: ShardCache | None = None) -> Source:
    """The index of a folder or URL, which is kept in ``cache``, or a folder of CLIP_benchmark's.

    Raises:
        MmrepError: If it is neither, or broken.
    """
    return ClipBenchmark.load(data) if ClipBenchmark.found_in(data) else Index.load(data, cache)


@dataclass(frozen=True)
class EvaluationLoader:
    """This rank's share of a split: batches, and how many samples all of them hold over all ranks."""

    batches: Iterable[Batch]
    samples: int


def open_split(
    source: Source,
    split: str,
    encoders: Mapping[str, Preprocessor],
    *,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    cache: ShardCache | None = None,
    replace: bool = False,
) -> EvaluationLoader:
    """Every sample of a split once, shared by the ranks.

    Args:
        source: Of the samples.
        split: Which of its splits.
        encoders: Modality -> what prepares it; the batches have these modalities and no others.
        batch_size: Samples of a batch of this rank.
        num_workers: Loader processes.
        rank: Of this process.
        world: Number of processes.
        cache: Where remote shards are kept.
        replace: Whether corrupt samples of an index are left out and not raised.

    Raises:
        MmrepError: If the split is missing, or a modality does not fit.
    """
    together = batch_size * world
    if isinstance(source, ClipBenchmark):
        theirs = ClipBenchmarkDataset(source, split, encoders, together)
        loader = clip_benchmark_loader(theirs, num_workers=num_workers, rank=rank, world=world)
        return EvaluationLoader(loader, len(theirs))
    ours = ShardDataset(Samples(source, split, cache), encoders, global_batch_size=together, replace=replace)
    loader = make_loader(ours, encoders, num_workers=num_workers, rank=rank, world=world)
    return EvaluationLoader(loader, len(ours))


def retrieval_encoders(
    source: Source, encoders: Mapping[str, Preprocessor], image: str = "image", text: str = "text"
) -> dict[str, Preprocessor]:
    """The encoders that retrieval over a source asks for: all over an index, two over a folder of CLIP_benchmark's.

    Raises:
        ConfigError: If the folder is of classification, or the model lacks the modality of pictures or of captions.
    """
    if isinstance(source, Index):
        return dict(encoders)
    if source.kind != RETRIEVAL:
        raise ConfigError(
            f"a data set of type {source.kind}", where=source.folder, fix="use: mmrep eval classification"
        )
    return {name: encoders[only_of(encoders, "modality", name, None)] for name in (image, text)}


def check_split(source: Source, split: str) -> None:
    """Refuse a split that is not there, without reading it.

    Raises:
        DataError: With the nearest that is.
    """
    if isinstance(source, Index):
        source.split(split)
    else:
        source.shards(split)


@dataclass(frozen=True)
class ClassTask:
    """What zero-shot classification on a source is.

    Attributes:
        prompts: Of each class.
        labels: The label of a batch that holds the class; where a sample may have several, one label for each class.
        multilabel: Which of the two.
        language: Of the prompts.
    """

    prompts: list[list[str]]
    labels: list[str]
    multilabel: bool
    language: str


def class_task(
    source: Source,
    *,
    label: str | None = None,
    templates: Path | str | None = None,
    classnames: Path | str | None = None,
    language: str | None = None,
) -> ClassTask:
    """Classes and prompts of a source, or of files in their place.

    Args:
        source: Of the samples.
        label: Which label of the index; it may be left out where there is one.
        templates: A file, in place of the source's: see `mmrep.evaluation.prompts.read_templates`.
        classnames: A file with other names for the same classes, in another language say.
        language: Which templates that come with mmrep, or which of a file of many languages; English by default.

    Raises:
        ConfigError: If a label, a file or a language is missing, or the names are not as many as the classes.
    """
    where: object = source.folder
    own: Templates
    if isinstance(source, Index):
        name = only_of(source.labels, "label", label, where)
        labels, known, own = [name], source.labels[name].classes, source.labels[name].templates
    else:
        if label is not None:
            raise ConfigError(
                f"--label {label}: a folder of CLIP_benchmark's has its own", where=where, fix="leave it out"
            )
        name, labels, known, own = _of_clip_benchmark(source)
    keys = (
        [language, name] if language else [name, "en"]
    )  # English in place of what was asked for would be a wrong figure
    classes = read_classnames(Path(classnames), keys) if classnames else known
    if len(classes) != len(known):
        raise ConfigError(f"{len(classes)} names for {len(known)} classes", where=classnames)
    chosen = _choose_templates(templates, language, own, classes, keys)
    multilabel = isinstance(source, ClipBenchmark) and source.kind == MULTILABEL
    return ClassTask(prompts_of(classes, chosen), labels, multilabel, language or "en")


def _of_clip_benchmark(source: ClipBenchmark) -> tuple[str, list[str], list[str], Templates]:
    if source.kind == RETRIEVAL:
        raise ConfigError("a data set of type retrieval", where=source.folder, fix="use: mmrep eval retrieval")
    if not source.classes:
        raise ConfigError("there is no classnames.txt", where=source.folder)
    several = [target_label(number) for number in range(len(source.classes))]
    return source.folder.name, several if source.kind == MULTILABEL else [LABEL], source.classes, source.templates


def _choose_templates(
    file: Path | str | None, language: str | None, own: Templates, classes: Sequence[str], keys: Sequence[str]
) -> Templates:
    """A file first, then the language's, then the source's, then the English ones."""
    if file:
        return read_templates(Path(file), classes, keys)
    if language:
        return shipped_templates(language)
    return own or TEMPLATES["en"]
