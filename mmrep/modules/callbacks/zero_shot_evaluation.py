"""`ZeroShotEvaluation`: zero-shot figures on further data while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from mmrep.data.faults import FaultLog
from mmrep.data.shard_cache import ShardCache
from mmrep.errors import ConfigError, check_choice
from mmrep.evaluation.retrieval import Direction, all_directions
from mmrep.evaluation.sources import Source, check_split, class_task, open_source, retrieval_encoders
from mmrep.evaluation.zero_shot import (
    EMBEDDING,
    Split,
    check_classification,
    zero_shot_classification,
    zero_shot_retrieval,
)
from mmrep.model import MultimodalModel
from mmrep.modules.callbacks.evaluation import (
    VALIDATING,
    EvaluationCallback,
    as_in_run,
    run_cache,
    run_data,
    stop_point,
)

TASKS = ("classification", "retrieval")
RETRIEVAL_FIGURES = ("recall@1", "recall@5", "recall@10", "mrr", "median_rank")
CLASSIFICATION_FIGURES = ("acc1", "acc5", "mean_per_class_recall")
MULTILABEL_FIGURES = ("mean_average_precision",)


class ZeroShotEvaluation(EvaluationCallback):
    """Runs what ``mmrep eval`` runs after a validation, and logs its figures as ``eval/NAME/acc1``.

    The ranks share the samples, each sample once, and log equal figures, so that a checkpoint may be chosen by one.

    Args:
        data: Folder or URL with an index.json, or folder of CLIP_benchmark's; by default the run's.
        task: ``classification`` or ``retrieval``.
        name: In the log; by default the last part of ``data``, or the task.
        split: Which split.
        every_n_epochs: How often.
        batch_size: Samples embedded at once by each rank.
        num_workers: Loader processes of each rank.
        modality: What is classified, as ``image`` or ``audio+image``; in retrieval over a folder of CLIP_benchmark's, what
            takes its pictures.
        text_modality: What takes prompts, or captions of such a folder.
        label: Of an index with several labels.
        templates, classnames, language: See `mmrep.evaluation.sources.class_task`.
        directions: Of retrieval; by default all that the loss can score.

    Raises:
        ConfigError: If the task is unknown, or a number is not positive.

    Example:
        In a config::

            trainer:
              callbacks:
                - class_path: mmrep.modules.callbacks.ZeroShotEvaluation
                  init_args: {data: data/imagenet_val, task: classification, every_n_epochs: 5}
    """

    def __init__(
        self,
        data: str | None = None,
        task: str = "retrieval",
        *,
        name: str | None = None,
        split: str = "test",
        every_n_epochs: int = 1,
        batch_size: int = 256,
        num_workers: int = 0,
        modality: str = "image",
        text_modality: str = "text",
        label: str | None = None,
        templates: str | None = None,
        classnames: str | None = None,
        language: str | None = None,
        directions: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name or (Path(data).name if data else task), every_n_epochs)
        check_choice("task", task, TASKS)
        if batch_size < 1 or num_workers < 0:
            raise ConfigError(f"batch_size={batch_size} must be at least 1, num_workers={num_workers} not negative")
        self.data, self.task, self.split = data, task, split
        self.batch_size, self.num_workers = batch_size, num_workers
        self.modality, self.text_modality, self.directions = modality, text_modality, directions
        self.classes: dict[str, Any] = {
            "label": label, "templates": templates, "classnames": classnames, "language": language
        }  # fmt: skip
        self._figures: list[str] = []
        self._cache: ShardCache | None = None

    def figures(self) -> list[str]:
        return self._figures

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out before the first step that the data are not there, or not of this task, or not for this model."""
        if stage not in VALIDATING:
            return
        self.data = self.data or run_data(trainer, type(self).__name__)
        self._cache = run_cache(trainer)
        source, model = open_source(self.data, self._cache), pl_module.model
        assert isinstance(model, MultimodalModel), "of a ContrastiveModule"
        check_split(source, self.split)
        if self.task == "classification":
            task = class_task(source, **self.classes)
            check_classification(model, self._given, self.text_modality)
            few = () if len(task.prompts) >= 5 else ("acc5",)
            names = MULTILABEL_FIGURES if task.multilabel else CLASSIFICATION_FIGURES
            self._figures = [name for name in names if name not in few]
        else:
            known = retrieval_encoders(source, model.by_modality, self.modality, self.text_modality)
            directions = self._directions(source, model) or all_directions(list(known))
            self._figures = [f"{direction}/{name}" for direction in directions for name in RETRIEVAL_FIGURES]

    @property
    def _given(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.modality.split("+"))))

    def _directions(self, source: Source, model: MultimodalModel) -> list[Direction] | None:
        known = retrieval_encoders(source, model.by_modality, self.modality, self.text_modality)
        return [Direction.parse(text, list(known)) for text in self.directions or ()] or None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.due(trainer):
            model = pl_module.model
            assert isinstance(model, MultimodalModel), "of a ContrastiveModule"
            with as_in_run(trainer) as faults:
                figures = self.evaluate(model, stop_point(trainer), faults)
            self.log_figures(pl_module, figures)

    def evaluate(
        self, model: MultimodalModel, between: Callable[[], None] = lambda: None, faults: FaultLog | None = None
    ) -> dict[str, float]:
        """The figures by name, without those that do not exist. A collective: every rank calls it.

        Args:
            model: In evaluation mode afterwards.
            between: Called after each batch that was embedded, equally often on all ranks.
            faults: Notes the corrupt samples of an index, which are left out then and not raised.
        """
        assert self.data is not None, "known since it was set up"

        @contextmanager
        def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
            yield lambda count: between() if title == EMBEDDING else None  # ranks may have unequally many prompts

        source = open_source(self.data, self._cache)
        split = Split(source, self.split, self.batch_size, self.num_workers, progress, self._cache, faults)
        names = {"image": self.modality, "text": self.text_modality}
        if self.task == "retrieval":
            directions, _ = zero_shot_retrieval(model, split, self._directions(source, model), **names)
            figures = {f"{d}/{name}": found[name] for d, found in directions.items() for name in RETRIEVAL_FIGURES}
        else:
            task = class_task(source, **self.classes)
            found = zero_shot_classification(model, split, task, given=self._given, text=self.text_modality)
            figures = {name: found[name] for name in (*CLASSIFICATION_FIGURES, *MULTILABEL_FIGURES) if name in found}
        return {name: value for name, value in figures.items() if value is not None}
