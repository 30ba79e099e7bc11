"""`ShardDataModule`: shards for the Lightning trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from mmrep.batch import Batch
from mmrep.data.dataset import Preprocessor, ShardDataset, check_modalities, make_loader
from mmrep.data.index import Index
from mmrep.data.plan import Plan
from mmrep.data.reader import Samples
from mmrep.errors import ConfigError


class ShardDataModule(pl.LightningDataModule):
    """Batches from a folder of WebDataset shards with an index.json.

    How a modality is prepared is its encoder's affair, so that preprocessing and weights never part; the loaders ask the
    module that is being trained for its encoders.

    Args:
        path: Folder with the shards and their index.json.
        global_batch_size: Samples of one step over all ranks together.
        num_workers: Loader processes per rank.
        seed: Of the order and of the augmentation.
        train_split: Split to train on.
        val_split: Split to validate on after each epoch.
        test_split: Split for ``mmrep test`` and ``mmrep predict``.
    """

    def __init__(
        self,
        path: str,
        global_batch_size: int = 256,
        num_workers: int = 1,
        seed: int = 0,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
    ) -> None:
        super().__init__()
        self.path, self.global_batch_size, self.num_workers, self.seed = path, global_batch_size, num_workers, seed
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.index: Index | None = None

    def setup(self, stage: str) -> None:
        self.index = Index.load(self.path)

    def check(self, encoders: Mapping[str, Preprocessor], stage: str) -> None:
        """Find out that the shards cannot feed a run before it starts.

        Args:
            encoders: Modality -> encoder.
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            MmrepError: If the index, a split or a shard is missing, or a modality or its kind does not fit.
        """
        index = Index.load(self.path)
        check_modalities(index, encoders)
        splits = {"fit": (self.train_split, self.val_split), "validate": (self.val_split,)}.get(
            stage, (self.test_split,)
        )
        for split in splits:
            Plan(len(Samples(index, split)), self.global_batch_size, self.seed, split == self.train_split)

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_split, train=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_split, train=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_split, train=False)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.test_split, train=False)

    def _loader(self, split: str, *, train: bool) -> DataLoader[Batch]:
        trainer = self.trainer
        assert self.index is not None, "Lightning calls setup() before it asks for loaders"
        assert trainer is not None, "a trainer is attached before its loaders are made"
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "the plan shares samples over ranks itself", fix="give Trainer(use_distributed_sampler=False)"
            )
        encoders = cast(Mapping[str, Preprocessor], cast(Any, trainer.lightning_module.model).by_modality)
        return make_loader(
            ShardDataset(Samples(self.index, split), encoders, train=train, seed=self.seed),
            encoders,
            self.global_batch_size,
            num_workers=self.num_workers,
            epoch=lambda: trainer.current_epoch,
            rank=trainer.global_rank,
            world=trainer.world_size,
            pin_memory=trainer.strategy.root_device.type == "cuda",
        )
