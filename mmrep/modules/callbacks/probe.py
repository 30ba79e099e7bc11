"""`Probe`: what callbacks that classify the features of one backbone share."""

from __future__ import annotations

import pytorch_lightning as pl

from mmrep.errors import ConfigError, MmrepError, did_you_mean
from mmrep.model import MultimodalModel
from mmrep.modules.callbacks.evaluation import EvaluationCallback

ONE_CLASS = "a probe wants one class per sample, a name or a number, in the label's field of the samples' JSON"


class Probe(EvaluationCallback):
    """Logs ``eval/NAME/acc1`` and, with five classes or more, ``acc5``.

    Args:
        name: In the log.
        modality: Whose backbone.
        label: Of the index; it may be left out where there is one.
        every_n_epochs: How often.

    Attributes:
        classes: The label's, known after `setup`.
    """

    def __init__(self, name: str, modality: str, label: str | None, every_n_epochs: int) -> None:
        super().__init__(name, every_n_epochs)
        self.modality, self.label = modality, label
        self.classes: list[str] = []

    def figures(self) -> list[str]:
        return ["acc1", *(["acc5"] if len(self.classes) >= 5 else [])]

    def model_of(self, pl_module: pl.LightningModule) -> MultimodalModel:
        """The model that is trained.

        Raises:
            ConfigError: If it lacks the modality.
        """
        model = pl_module.model
        assert isinstance(model, MultimodalModel), "of a ContrastiveModule"
        if self.modality not in model.by_modality:
            raise ConfigError(
                f"the model has no modality '{self.modality}'", fix=did_you_mean(self.modality, model.by_modality)
            )
        return model

    def accuracies(self, first: int, five: int, asked: int) -> dict[str, float]:
        """The figures by name: of how many that were asked the class came first, and among the first five."""
        shares = {"acc1": first / asked, "acc5": five / asked}
        return {name: shares[name] for name in self.figures()}

    def check_labelled(self, count: int, split: str) -> None:
        """Refuse a split without a sample to probe.

        Raises:
            MmrepError: If there is none. ``count`` is of all ranks, which stop together.
        """
        if not count:
            raise MmrepError(
                f"no {split} sample has '{self.modality}' and a class in the label '{self.label}'", fix=ONE_CLASS
            )
