"""The two zero-shot evaluations of a model on a split, as the command line and the validation callback run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mmrep.data.dataset import Preprocessor
from mmrep.data.faults import FaultLog
from mmrep.data.shard_cache import ShardCache
from mmrep.errors import ConfigError, did_you_mean
from mmrep.evaluation.classification import class_embeddings, classify
from mmrep.evaluation.embeddings import Embeddings, embed_loader
from mmrep.evaluation.retrieval import Direction, retrieve
from mmrep.evaluation.sources import ClassTask, Source, open_split, retrieval_encoders
from mmrep.model import MultimodalModel
from mmrep.ops.gather import rank, world_size

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""From a title and a number of steps to a context whose value advances the bar: `mmrep.progress.progress`."""

EMBEDDING = "embedding"
"""Title of the progress of a split's samples."""


@contextmanager
def quiet(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """No progress bar."""
    yield lambda count: None


@dataclass(frozen=True)
class Split:
    """What is evaluated on, and how it is read.

    Attributes:
        source: Of the samples.
        name: Which of its splits.
        batch_size: Samples embedded at once by each rank.
        num_workers: Loader processes of each rank.
        progress: Shows how far it is.
        cache: Where remote shards are kept.
        faults: Notes the corrupt samples of an index, which are left out then and not raised.
    """

    source: Source
    name: str
    batch_size: int = 256
    num_workers: int = 0
    progress: Progress = quiet
    cache: ShardCache | None = None
    faults: FaultLog | None = None

    def embed(self, model: MultimodalModel, encoders: Mapping[str, Preprocessor]) -> Embeddings:
        """The embeddings of this rank's samples, on the model's device."""
        sizes = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        loader = open_split(
            self.source,
            self.name,
            encoders,
            **sizes,
            rank=rank(),
            world=world_size(),
            cache=self.cache,
            replace=self.faults is not None,
        )
        batches = loader.batches if self.faults is None else self.faults.noting(loader.batches, loader.samples)
        with self.progress(EMBEDDING, loader.samples) as advance:
            embeddings = embed_loader(model, batches, advance=advance)
        return embeddings.to(next(model.parameters()).device)


@torch.inference_mode()
def zero_shot_retrieval(
    model: MultimodalModel,
    split: Split,
    directions: Sequence[Direction] | None = None,
    *,
    image: str = "image",
    text: str = "text",
) -> tuple[dict[str, dict[str, Any]], Embeddings]:
    """Retrieval on a split. A collective: ranks share the embedding and the queries.

    Args:
        model: In evaluation mode afterwards.
        split: Of an index, or of a folder of CLIP_benchmark's of type ``retrieval``.
        directions: Which; by default all that the loss can score.
        image, text: The modalities that take the pictures and captions of such a folder.

    Returns:
        What `mmrep.evaluation.retrieval.retrieve` gives, and the embeddings of all samples.
    """
    embeddings = split.embed(model, retrieval_encoders(split.source, model.by_modality, image, text)).gathered()
    return retrieve(embeddings, model, directions), embeddings


def check_classification(model: MultimodalModel, given: Sequence[str], text: str) -> None:
    """Refuse to classify what the model does not have.

    Raises:
        ConfigError: On an unknown modality, or one that takes no prompts.
    """
    known = model.by_modality
    for name in (*given, text):
        if name not in known:
            raise ConfigError(f"the model has no modality '{name}'", fix=did_you_mean(name, known))
    if text in given or known[text].kind != "text":
        raise ConfigError(f"'{text}' cannot take the prompts for {'+'.join(given)}", fix="give --text-modality")


@torch.inference_mode()
def zero_shot_classification(
    model: MultimodalModel, split: Split, task: ClassTask, *, given: Sequence[str] = ("image",), text: str = "text"
) -> dict[str, Any]:
    """Classification on a split. A collective: ranks share the prompts and the samples.

    Args:
        model: In evaluation mode afterwards.
        split: Of an index with the label, or of a folder of CLIP_benchmark's.
        task: Classes and prompts.
        given: The modalities that are classified, one or several at once.
        text: The modality that takes the prompts.

    Returns:
        What `mmrep.evaluation.classification.classify` gives.
    """
    model.eval()
    check_classification(model, given, text)
    known = model.by_modality
    with split.progress("prompts", sum(map(len, task.prompts))) as advance:
        classifier = class_embeddings(model, text, task.prompts, batch_size=split.batch_size, advance=advance)
    embeddings = split.embed(model, {name: known[name] for name in given})
    return classify(
        embeddings, model, classifier, given=given, target=text, labels=task.labels, multilabel=task.multilabel
    )
