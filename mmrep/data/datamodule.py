"""`ShardDataModule`: shards for the Lightning trainer, and the place in them that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from mmrep.batch import Batch
from mmrep.data.dataset import Preprocessor, ShardDataset, check_modalities, make_loader
from mmrep.data.faults import MAX_BAD_FRACTION, FaultLog
from mmrep.data.index import Index
from mmrep.data.plan import Plan, from_the_start
from mmrep.data.position import Position
from mmrep.data.reader import Samples
from mmrep.data.shard_cache import ShardCache
from mmrep.data.stream import Stream, StreamDataset, StreamLoader
from mmrep.errors import ConfigError
from mmrep.ops.gather import world_size

COUNT_FAULTS_EVERY = 32
"""Batches after which the ranks add up their faulty samples."""


@dataclass(frozen=True)
class Source:
    """One dataset of a blend.

    Attributes:
        path: Folder or URL with an index.json.
        weight: Its share of every global batch, relative to the others.
        split: Its training split, where it is not ``data.train_split``.
    """

    path: str
    weight: float = 1.0
    split: str | None = None


class ShardDataModule(pl.LightningDataModule):
    """Batches from WebDataset shards with an index.json.

    How a modality is prepared is its encoder's affair, so that preprocessing and weights never part; the loaders ask the
    module that is being trained for its encoders.

    A checkpoint keeps the place in the stream. A run that goes on, on any number of ranks and workers, sees exactly the
    samples of the epoch that it had not seen.

    Args:
        path: Folder or URL of the index; or several datasets with weights, which are blended in every global batch.
        global_batch_size: Samples of one step over all ranks together.
        num_workers: Loader processes per rank.
        seed: Of the order and of the augmentation.
        train_split: Split to train on.
        val_split: Split to validate on after each epoch.
        test_split: Split for ``mmrep test`` and ``mmrep predict``.
        eval_path: Folder or URL of val_split and test_split, where it is not ``path``. Of a blend every dataset that has the
            split takes part.
        batching: ``mixed``, ``stratified`` or ``homogeneous`` in modality sets: see `mmrep.data.plan.Plan`.
        window: Shards whose samples are mixed at a time; of remote shards two windows should fit into the cache.
        max_bad_fraction: Share of the samples that may be corrupt. In training the next planned sample takes the place of a
            corrupt one, in validation it is left out; each is listed in the quarantine file.
        quarantine: That file, a CSV; ``mmrep fit`` puts it into the run folder.
        cache_dir: Where remote shards are kept; by default mmrep/shards in the user's cache folder.
        cache_gb: Bound of that folder, in GB.
        stream: A training stream that is not indexed: ``path`` is then a pattern or URL of its shards; no place inside an
            epoch is kept. See `mmrep.data.stream`.
    """

    def __init__(
        self,
        path: str | list[Source],
        global_batch_size: int = 256,
        num_workers: int = 1,
        seed: int = 0,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        eval_path: str | None = None,
        batching: str = "mixed",
        window: int = 64,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        quarantine: str | None = None,
        cache_dir: str | None = None,
        cache_gb: float = 64.0,
        stream: Stream | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= max_bad_fraction <= 1 or cache_gb <= 0:
            raise ConfigError(f"max_bad_fraction={max_bad_fraction}, cache_gb={cache_gb}", where="data")
        self.sources = [Source(path)] if isinstance(path, str) else list(path)
        if not self.sources:
            raise ConfigError("no dataset is named", where="data.path")
        if stream is not None and not isinstance(path, str):
            raise ConfigError("a stream is one place, not a blend", where="data.path")
        self.stream = stream
        self.global_batch_size, self.num_workers, self.seed = global_batch_size, num_workers, seed
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.eval_path, self.batching, self.window = eval_path, batching, window
        self.cache = ShardCache(cache_dir, int(cache_gb * 1e9))
        self.quarantine, self.max_bad_fraction = quarantine, max_bad_fraction
        self.index: Index | None = None
        self._indexes: dict[str, Index] = {}
        self._resumed: Position | None = None
        self._stage = "fit"
        self._faults: dict[str, FaultLog] = {}
        self._batches = 0

    def setup(self, stage: str) -> None:
        self._stage, self._resumed, self._faults = stage, None, {}
        self.index = None if self.stream else self._index(self.sources[0].path)

    def check(self, encoders: Mapping[str, Preprocessor], stage: str) -> None:
        """Find out that the shards cannot feed a run before it starts.

        Args:
            encoders: Modality -> encoder.
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            MmrepError: If the index, a split or a shard is missing, or a modality or its kind does not fit.
        """
        splits = {"fit": (self.train_split, self.val_split), "validate": (self.val_split,)}.get(
            stage, (self.test_split,)
        )
        for split in splits:
            train = stage == "fit" and split == self.train_split
            if train and self.stream:
                self._streamed(self.stream, encoders)
                continue
            if stage == "fit" and self._only_streams:
                continue
            parts = self._parts(split, train=train)
            check_modalities([samples.index for samples in parts], encoders)
            self._plan(parts, list(encoders), train=train)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._stream_loader(self.stream) if self.stream else self._loader(self.train_split, train=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        if self._stage == "fit" and self._only_streams:
            return []
        return self._loader(self.val_split, train=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_split, train=False)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_split, train=False)

    def validated(self) -> list[Samples]:
        """The samples of ``val_split``, dataset by dataset; none where only streams are trained on."""
        return [] if self._only_streams else self._parts(self.val_split, train=False)

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream: equal on all ranks, and independent of their number."""
        return self._here().to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a place, in training.

        Raises:
            CheckpointError: If the data or their order are not those of the checkpoint.
        """
        if self._stage == "fit":
            saved = Position.from_dict(state_dict)
            saved.check(self._here())
            self._resumed = saved
            if self.stream and saved.batch:
                rank_zero_warn(f"a stream keeps no place in an epoch: the rest of epoch {saved.epoch} is drawn anew")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note the faulty samples of a batch; now and then the ranks add up theirs, and stop together if they are too many."""
        trainer = self.trainer
        assert trainer is not None, "Lightning calls this"
        if trainer.training:
            _count_the_begun_epoch(trainer)
        split = self.train_split if trainer.training else self.val_split
        log = self._faults.get(split)
        if log is not None:
            log.add(batch.faults)
            self._batches += 1
            last = trainer.training and trainer.is_last_batch
            if world_size() == 1 or last or self._batches % COUNT_FAULTS_EVERY == 0:
                self._check_faults()
        return batch

    def _check_faults(self) -> None:
        for log in self._faults.values():
            log.check_over_ranks(self._device())

    def _here(self) -> Position:
        """Where the training stands: the batch that comes next."""
        trainer = self.trainer
        epoch, batch = 0, 0
        if trainer is not None:
            epoch, progress = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current
            batch = progress.processed  # type: ignore[attr-defined]  # declared by a subclass only
            if batch >= trainer.num_training_batches:
                epoch, batch = epoch + 1, 0
        return Position(
            epoch,
            batch,
            {
                "data.seed": self.seed,
                "data.global_batch_size": self.global_batch_size,
                "data.batching": self.batching,
                "data.window": self.window,
                "data.train_split": self.train_split,
                **self._data_settings(),
            },
        )

    def _data_settings(self) -> dict[str, Any]:
        if self.stream:
            return {"data.path": self.sources[0].path, "data.stream": asdict(self.stream)}
        sources = [[self._index(source.path).fingerprint, source.weight, source.split] for source in self.sources]
        return {"data.path": sources}

    def _position(self) -> tuple[int, int]:
        """Epoch and first batch of a pass that begins now."""
        trainer = self.trainer
        assert trainer is not None, "a trainer is attached before its loaders are made"
        saved = self._resumed
        # Lightning may ask for the first batches before it has restored its own epoch.
        if saved is not None and saved.epoch >= trainer.current_epoch:
            return saved.epoch, saved.batch
        return trainer.current_epoch, 0

    def _loader(self, split: str, *, train: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None, "a trainer is attached before its loaders are made"
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "the plan shares samples over ranks itself", fix="give Trainer(use_distributed_sampler=False)"
            )
        encoders = self._encoders()
        parts = self._parts(split, train=train)
        fitting = self._stage == "fit"
        if fitting:
            self._faults[split] = self.fault_log(sum(len(samples) for samples in parts))
        plan = self._plan(parts, list(encoders), train=train)
        return make_loader(
            ShardDataset(parts, encoders, plan=plan, train=train, seed=self.seed, replace=fitting),
            encoders,
            num_workers=self.num_workers,
            position=self._position if train else from_the_start,
            rank=trainer.global_rank,
            world=trainer.world_size,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )

    def _stream_loader(self, stream: Stream) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None, "a trainer is attached before its loaders are made"

        def position() -> tuple[int, int]:
            epoch, batch = self._position()
            # There is no number of all samples; those drawn by the end of the epoch stand for it.
            drawn = (epoch + 1) * stream.batches_per_epoch * self.global_batch_size
            self._faults[self.train_split].samples = drawn
            return epoch, batch

        self._faults[self.train_split] = self.fault_log(0)
        dataset = self._streamed(stream, self._encoders(), trainer.global_rank, trainer.world_size)
        pin_memory = trainer.strategy.root_device.type == "cuda"
        return StreamLoader(dataset, self.num_workers, position, pin_memory)

    def _streamed(
        self, stream: Stream, encoders: Mapping[str, Preprocessor], rank: int = 0, world: int = 1
    ) -> StreamDataset:
        return StreamDataset(
            self.sources[0].path,
            stream,
            encoders,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            rank=rank,
            world=world,
        )

    def _encoders(self) -> Mapping[str, Preprocessor]:
        assert self.trainer is not None, "a trainer is attached before its loaders are made"
        return cast(Mapping[str, Preprocessor], cast(Any, self.trainer.lightning_module.model).by_modality)

    def fault_log(self, samples: int = 0) -> FaultLog:
        """Where an evaluation of so many samples, within a training, notes the corrupt ones."""
        return FaultLog(Path(self.quarantine) if self.quarantine else None, samples, self.max_bad_fraction)

    @property
    def _only_streams(self) -> bool:
        """Whether there is nothing to evaluate on."""
        return self.stream is not None and self.eval_path is None

    def _plan(self, parts: Sequence[Samples], modalities: list[str], *, train: bool) -> Plan:
        contents = [samples.contents(modalities) for samples in parts]
        weights = [source.weight for source in self.sources] if train and len(parts) > 1 else ()
        return Plan(contents, self.global_batch_size, self.seed, train, weights, self.batching, self.window)

    def _parts(self, split: str, *, train: bool) -> list[Samples]:
        if train:
            return [Samples(self._index(s.path), s.split or split, self.cache) for s in self.sources]
        if self._only_streams:
            raise ConfigError("a stream has no split to evaluate on", where="data", fix="give data.eval_path")
        indexes = [
            self._index(path) for path in ([self.eval_path] if self.eval_path else [s.path for s in self.sources])
        ]
        having = [index for index in indexes if split in index.splits]
        return [Samples(index, split, self.cache) for index in having or indexes[:1]]

    def _index(self, path: str) -> Index:
        if path not in self._indexes:
            self._indexes[path] = Index.load(path, self.cache)
        return self._indexes[path]

    def _device(self) -> torch.device:
        assert self.trainer is not None, "a trainer is attached before it trains"
        return self.trainer.strategy.root_device


def _count_the_begun_epoch(trainer: pl.Trainer) -> None:
    """Mend a count of Lightning's: an epoch that begins by resuming at the end of the one before is not counted as begun.

    A later checkpoint inside it would be taken for one of its end.
    """
    progress = trainer.fit_loop.epoch_progress
    if progress.total.ready == progress.total.completed:
        progress.increment_ready()
        progress.increment_started()
