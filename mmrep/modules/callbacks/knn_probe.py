"""`KNNProbe`: classification by nearest neighbours while a model is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from mmrep.data.dataset import check_modalities
from mmrep.data.faults import FaultLog
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.data.shard_cache import ShardCache
from mmrep.encoders import Encoder
from mmrep.errors import ConfigError, MmrepError
from mmrep.evaluation.clip_benchmark import ClipBenchmark
from mmrep.evaluation.knn import TEMPERATURE, knn_votes
from mmrep.evaluation.probe import Labelled
from mmrep.evaluation.prompts import only_of
from mmrep.evaluation.ranks import in_blocks
from mmrep.model import MultimodalModel
from mmrep.modules.callbacks.evaluation import VALIDATING, as_in_run, run_cache, run_data, stop_point
from mmrep.modules.callbacks.labelled_features import labelled_features
from mmrep.modules.callbacks.probe import Probe
from mmrep.ops.gather import gather_rows, sum_over_ranks


class KNNProbe(Probe):
    """Each query's class is voted for by its k nearest training samples, by the cosine of the backbone's features.

    What ``mmrep eval probe --method knn`` computes, at one k. Nothing is trained, so that the figure is of the features alone:
    those of the averages with `EMA`. Ranks share the samples of both splits, and log equal figures: ``eval/NAME/acc1`` and,
    with five classes or more, ``acc5``. Every rank holds the features of the whole bank.

    Shards at a URL are kept in ``data.cache_dir``. The bank is spread over all shards of its split, so that all are
    downloaded, whatever ``max_bank`` is, and anew each time if they do not fit into ``data.cache_gb``.

    Args:
        modality: Whose backbone.
        label: Of the index; it may be left out where there is one.
        data: Folder or URL with an index.json, with both splits; by default what the run trains and validates on.
        bank_split: Whose samples vote.
        split: Whose samples ask.
        k: Neighbours that vote.
        temperature: Of the votes ``exp(cosine / temperature)``.
        max_bank: Samples of ``bank_split`` that vote, evenly spaced over it; null for all.
        name: In the log; by default ``knn_MODALITY``.
        every_n_epochs: How often.
        batch_size: Samples that go through the backbone at once, on each rank.
        num_workers: Loader processes of each rank.

    Raises:
        ConfigError: On impossible values.

    Example:
        In a config::

            trainer:
              callbacks:
                - class_path: mmrep.modules.callbacks.KNNProbe
                  init_args: {modality: image, label: label, every_n_epochs: 5}
    """

    def __init__(
        self,
        modality: str,
        label: str | None = None,
        *,
        data: str | None = None,
        bank_split: str = "train",
        split: str = "val",
        k: int = 20,
        temperature: float = TEMPERATURE,
        max_bank: int | None = 50_000,
        name: str | None = None,
        every_n_epochs: int = 1,
        batch_size: int = 256,
        num_workers: int = 0,
    ) -> None:
        super().__init__(name or f"knn_{modality}", modality, label, every_n_epochs)
        least = min(k, batch_size, 1 if max_bank is None else max_bank)
        if least < 1 or temperature <= 0 or num_workers < 0:
            raise ConfigError(
                f"k={k}, temperature={temperature}, max_bank={max_bank} and batch_size={batch_size} must be positive, "
                f"num_workers={num_workers} not negative",
                where="KNNProbe",
            )
        self.data = data
        self._bank: Index | None = None
        self._asking: Index | None = None
        self._cache: ShardCache | None = None
        self.bank_split, self.split, self.k, self.temperature, self.max_bank = (
            bank_split,
            split,
            k,
            temperature,
            max_bank,
        )
        self.batch_size, self.num_workers = batch_size, num_workers

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out before the first step that data, splits, label or modality are not there."""
        if stage not in VALIDATING:
            return
        encoder, self._cache = self.model_of(pl_module).by_modality[self.modality], run_cache(trainer)
        bank = _open(self.data or run_data(trainer, type(self).__name__, train=True), self._cache)
        index = _open(self.data or run_data(trainer, type(self).__name__), self._cache)
        self._bank, self._asking = bank, index
        for each in (bank, index):
            check_modalities([each], {self.modality: encoder})
        Samples(bank, self.bank_split)
        Samples(index, self.split)
        self.label = only_of(bank.labels, "label", self.label, bank.root)
        self.classes = bank.labels[self.label].classes
        if only_of(index.labels, "label", self.label, index.root) and index.labels[self.label].classes != self.classes:
            raise ConfigError(f"label '{self.label}' has other classes than in {bank.root}", where=index.root)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.due(trainer):
            with as_in_run(trainer) as faults:
                figures = self.evaluate(self.model_of(pl_module), stop_point(trainer), faults)
            self.log_figures(pl_module, figures)

    @torch.inference_mode()
    def evaluate(
        self, model: MultimodalModel, between: Callable[[], None] = lambda: None, faults: FaultLog | None = None
    ) -> dict[str, float]:
        """The figures by name. A collective: every rank calls it, after `setup`.

        Args:
            model: In evaluation mode afterwards.
            between: Called before each batch, equally often on all ranks.
            faults: Notes the corrupt samples, which are left out then and not raised.

        Raises:
            MmrepError: If a split has nothing to probe, or features are not finite; on all ranks.
        """
        encoder = model.eval().by_modality[self.modality]
        how = {"device": next(model.parameters()).device, "between": between, "faults": faults}
        bank = self._gathered(*self._share(encoder, self._bank, self.bank_split, self.max_bank, how))
        asking, _ = self._share(encoder, self._asking, self.split, None, how)
        broken = ~torch.cat([bank.features, asking.features]).isfinite().all(dim=1)
        right = self._count_right(bank, asking) if len(bank.classes) else asking.classes.new_zeros(2)
        counts = torch.cat([right, broken.sum()[None], right.new_tensor([len(asking.classes)])])
        first, five, not_finite, n = sum_over_ranks(counts).tolist()
        self.check_labelled(len(bank.classes), self.bank_split)
        self.check_labelled(n, self.split)
        if not_finite:
            raise MmrepError(
                f"features of '{self.modality}' hold NaN or infinity",
                fix="the model has diverged; lower the learning rate",
            )
        return self.accuracies(first, five, n)

    def _count_right(self, bank: Labelled, asking: Labelled) -> Tensor:
        """How many of this rank's queries have their class first, and among the first five that anybody votes for."""
        k, n = min(self.k, len(bank.classes)), len(asking.classes)
        rows = asking.features[in_blocks(torch.arange(n, device=asking.classes.device))]
        votes = knn_votes(bank, rows, len(self.classes), [k], self.temperature)[k][:n]
        most, which = votes.topk(min(5, votes.shape[1]), dim=1)
        first = votes.argmax(dim=1) == asking.classes
        return torch.stack([first.sum(), ((which == asking.classes[:, None]) & (most > 0)).sum()])

    @staticmethod
    def _gathered(mine: Labelled, places: Tensor) -> Labelled:
        """The bank of all ranks in the order of its samples: of equal cosines the first ones vote, on any number of ranks."""
        order = gather_rows(places).argsort()
        return Labelled(gather_rows(mine.features)[order], gather_rows(mine.classes)[order])

    def _share(
        self, encoder: Encoder, index: Index | None, split: str, most: int | None, how: dict[str, Any]
    ) -> tuple[Labelled, Tensor]:
        assert index is not None and self.label is not None, "known since it was set up"
        return labelled_features(
            encoder,
            index,
            split,
            self.modality,
            self.label,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            most=most,
            cache=self._cache,
            **how,
        )


def _open(data: str, cache: ShardCache | None) -> Index:
    if ClipBenchmark.found_in(data):
        raise ConfigError("a folder of CLIP_benchmark's; a probe wants shards with an index.json", where=data)
    return Index.load(data, cache)
