"""`OnlineLinearProbe`: a linear classifier that is trained beside the run, on features it computes anyway."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from mmrep.batch import Batch
from mmrep.data.datamodule import ShardDataModule
from mmrep.data.index import Index
from mmrep.errors import ConfigError
from mmrep.evaluation.prompts import only_of
from mmrep.modules.callbacks.head_inputs import HeadInputs
from mmrep.modules.callbacks.online_classifier import OnlineClassifier
from mmrep.modules.callbacks.probe import Probe
from mmrep.ops.gather import sum_over_ranks


class OnlineLinearProbe(Probe):
    """Linear probe by stochastic gradient descent on the features of the training batches, as in solo-learn and lightly.

    The features are those that the backbone gives in the step, with its dropout and augmentation, cut off from the graph:
    nothing runs twice, and the model, its gradients and its random numbers are what they are without the probe. Samples without
    a class or without the modality are left out. The gradient is that of the global batch, and the probe is equal on all ranks.

    Logs ``eval/NAME/acc1`` and, with five classes or more, ``acc5`` of the validation split, whose features come from the
    validation's own pass. With `EMA` these are features of the averages, and the probe has learnt on those of the weights: near
    each other once the average has caught up; `KNNProbe` has no such gap.

    Args:
        modality: Whose backbone.
        label: Of the index; it may be left out where there is one.
        name: In the log; by default ``linear_MODALITY``.
        lr, momentum, weight_decay: Of the probe: see `mmrep.modules.callbacks.online_classifier.OnlineClassifier`.
        every_n_epochs: How often it is validated. It learns in every step.

    Raises:
        ConfigError: On impossible values.

    Example:
        In a config::

            trainer:
              callbacks:
                - class_path: mmrep.modules.callbacks.OnlineLinearProbe
                  init_args: {modality: image, label: label}
    """

    def __init__(
        self,
        modality: str,
        label: str | None = None,
        *,
        name: str | None = None,
        lr: float = 2.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(name or f"linear_{modality}", modality, label, every_n_epochs)
        if lr <= 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ConfigError(
                f"lr={lr} must be positive, momentum={momentum} in [0, 1), weight_decay={weight_decay} not negative",
                where="OnlineLinearProbe",
            )
        self.rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self._classifier: OnlineClassifier | None = None
        self._inputs: HeadInputs | None = None
        self._right = torch.zeros(3, dtype=torch.int64)  # among the first, among the first five, of how many

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out before the first step that the model lacks the modality, or the data the label."""
        if stage != "fit":
            return
        self._inputs = HeadInputs(self.model_of(pl_module), self.modality)
        self.label, self.classes = _label_of(trainer.datamodule, self.label)  # type: ignore[attr-defined]  # set by a connector
        self._classifier = OnlineClassifier(self._inputs.encoder.feature_dim, len(self.classes), **self.rates)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        classifier, inputs = self._made()
        classifier.to(pl_module.device)
        inputs.attach()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._made()[1].expect(batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        classifier, inputs = self._made()
        classifier.learn(inputs.take(batch), self._classes_of(batch))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._right = torch.zeros(3, dtype=torch.int64, device=pl_module.device)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counts(trainer):
            self._made()[1].expect(batch)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._counts(trainer):
            classifier, inputs = self._made()
            self._right += count_right(classifier.scores(inputs.take(batch)), self._classes_of(batch))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._counts(trainer):
            return
        first, five, n = sum_over_ranks(self._right).tolist()
        self.check_labelled(int(self._made()[0].steps), "training")  # counted over all ranks
        self.check_labelled(n, "validation")
        self.log_figures(pl_module, self.accuracies(first, five, n))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._inputs is not None:
            self._inputs.detach()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._classifier is None else dict(self._classifier.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._classifier is not None:
            self._classifier.load_state_dict(state_dict)

    def _counts(self, trainer: pl.Trainer) -> bool:
        """Whether this validation is logged: a probe is trained by a run, and is nothing without it."""
        return trainer.state.fn == TrainerFn.FITTING and self.due(trainer)

    def _classes_of(self, batch: Batch) -> Tensor:
        assert self.label is not None, "known since it was set up"
        classes = batch.labels[self.label]
        return torch.where(batch.present[self.modality], classes, torch.full_like(classes, -1))

    def _made(self) -> tuple[OnlineClassifier, HeadInputs]:
        assert self._classifier is not None and self._inputs is not None, "made when a fit is set up"
        return self._classifier, self._inputs


def count_right(scores: Tensor, classes: Tensor) -> Tensor:
    """How many classes are first, how many among the first five, and of how many.

    Args:
        scores: ``[N, C]``.
        classes: int64 ``[N]``; below 0 where a sample is not counted.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = best == classes[:, None]  # none where the class is below 0
    return torch.stack([hits[:, :1].sum(), hits.sum(), (classes >= 0).sum()])


def _label_of(data: Any, label: str | None) -> tuple[str, list[str]]:
    """The label's name and classes, which training and validation data agree in.

    Raises:
        ConfigError: If there is no such label, or its classes differ.
    """
    if not isinstance(data, ShardDataModule) or data.stream is not None:
        raise ConfigError("OnlineLinearProbe wants indexed shards: a stream has no labels", fix="use KNNProbe")
    paths = [source.path for source in data.sources]
    training = [Index.load(path, data.cache) for path in paths]
    evaluated = [Index.load(data.eval_path, data.cache)] if data.eval_path else training
    labels = {name: found.classes for index in reversed(training) for name, found in index.labels.items()}
    name = only_of(labels, "label", label, training[0].root)
    for index in [*training, *evaluated]:
        if name in index.labels and index.labels[name].classes != labels[name]:
            raise ConfigError(f"label '{name}' has other classes than in {training[0].root}", where=index.root)
    if not any(name in index.labels for index in evaluated):
        raise ConfigError(f"the validation data have no label '{name}'", where=evaluated[0].root)
    return name, labels[name]
