"""Features of a split's labelled samples, each once, shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.faults import FaultLog
from mmrep.data.index import Index
from mmrep.data.plan import PADDING, Plan
from mmrep.data.reader import Samples
from mmrep.data.shard_cache import ShardCache
from mmrep.encoders import Encoder
from mmrep.encoders.base import placed
from mmrep.evaluation.probe import Labelled
from mmrep.ops.gather import rank, world_size


@dataclass(frozen=True)
class SpreadPlan(Plan):
    """An evaluation of at most so many samples, evenly spaced over the split: shards are often sorted by class."""

    most: int | None = None

    @property
    def num_samples(self) -> int:
        total = super().num_samples
        return total if self.most is None else min(total, self.most)

    def global_batch(self, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        places = number * self.global_batch_size + np.arange(self.global_batch_size)
        samples = places * len(self.contents[0]) // max(1, self.num_samples)
        none = np.zeros(len(places), dtype=np.int64)
        return none, none, np.where(places < self.num_samples, samples, PADDING)


@torch.inference_mode()
def labelled_features(
    encoder: Encoder,
    index: Index,
    split: str,
    modality: str,
    label: str,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    most: int | None = None,
    cache: ShardCache | None = None,
    faults: FaultLog | None = None,
    between: Callable[[], None] = lambda: None,
) -> tuple[Labelled, Tensor]:
    """This rank's share of a split: features of the backbone in fp32, with classes; and their places in it.

    Args:
        encoder: In evaluation mode.
        index: Of the shards.
        split: Which split.
        modality: Of the encoder. Samples that lack it, or a class, are left out.
        label: Whose classes.
        batch_size: Samples of a batch of this rank.
        num_workers: Loader processes.
        device: Where the encoder is, and the features.
        most: Samples of the split that are read, over all ranks.
        cache: Where remote shards are kept.
        faults: Notes the corrupt samples, which are left out then and not raised.
        between: Called before each batch, of which all ranks have equally many.
    """
    samples = Samples(index, split, cache)
    plan = SpreadPlan([samples.contents([modality])], batch_size * world_size(), 0, False, most=most)
    dataset = ShardDataset(samples, {modality: encoder}, plan=plan, replace=faults is not None)
    features = [torch.zeros(0, encoder.feature_dim, device=device)]
    classes = [torch.zeros(0, dtype=torch.int64, device=device)]
    places = [torch.zeros(0, dtype=torch.int64, device=device)]
    loader = make_loader(dataset, {modality: encoder}, num_workers=num_workers, rank=rank(), world=world_size())
    for number, batch in enumerate(loader if faults is None else faults.noting(loader, plan.num_samples)):
        between()
        known, inputs = batch.present[modality] & (batch.labels[label] >= 0), batch.inputs[modality]
        assert isinstance(inputs, Tensor), "in evaluation a sample comes once"
        if bool(known.any()):
            features.append(encoder.features(placed(inputs[known], encoder, device)).float())
            classes.append(batch.labels[label][known].to(device))
            places.append((number * world_size() + rank()) * batch_size + known.nonzero()[:, 0].to(device))
    return Labelled(torch.cat(features), torch.cat(classes)), torch.cat(places)
