"""Views, prototypes, and the queue of features that helps small batches to use them all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.errors import ConfigError, LossError
from mmrep.ops.multilinear import in_fp32

SHARED = "shared"


@dataclass(frozen=True)
class View:
    """One view of one modality.

    Attributes:
        modality: Its modality.
        number: Which view of it, from 0.
        rows: ``[B, D]`` of this rank.
        valid: bool ``[B]``: which are there.
    """

    modality: str
    number: int
    rows: Tensor
    valid: Tensor

    @property
    def name(self) -> str:
        return _view_name(self.modality, self.number)


class PrototypeBank(nn.Module):
    """Unit rows that embeddings are compared with, for all modalities or each; one or more sets (heads) of them.

    Args:
        owners: The modalities that have prototypes of their own; empty for shared ones.
        counts: Prototypes of each head.
        embed_dim: Width.
    """

    def __init__(self, owners: Sequence[str], counts: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        if not counts or min(counts) < 1:
            raise ConfigError(f"num_prototypes={list(counts)} must be positive")
        self.owners, self.counts = list(owners), list(counts)
        for head, count in enumerate(counts):
            for owner in owners or (SHARED,):
                weights = F.normalize(torch.randn(count, embed_dim), dim=1)
                self.register_parameter(f"{owner}_{head}", nn.Parameter(weights))

    def forward(self, modality: str, head: int) -> Tensor:
        """The prototypes ``[K, D]`` by which a modality's codes are made.

        In at least fp32. In training a copy, so that `normalize_` may change the parameter before a backward pass that needs
        the old one; in evaluation unit rows, as an optimiser's step leaves them slightly off.
        """
        weights = in_fp32(self._of(modality, head))
        return weights.clone() if self.training else F.normalize(weights, dim=1)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Bring every row back to length 1, as published, at the start of a step."""
        for weights in self.parameters():
            weights.copy_(F.normalize(weights, dim=1))

    def drop_gradients(self) -> None:
        """No step moves them then: a gradient of zero would not do, as momentum and weight decay still would."""
        for weights in self.parameters():
            weights.grad = None

    def _of(self, modality: str, head: int) -> Tensor:
        owner = modality if modality in self.owners else SHARED
        weights: Tensor = getattr(self, f"{owner}_{head}")
        return weights


class FeatureQueue(nn.Module):
    """The last ``length`` features of each assigning view, newest first, over all ranks and equal on all of them.

    Args:
        views: Names of the views.
        length: Features kept per view.
        embed_dim: Width.
    """

    rows: Tensor
    filled: Tensor

    def __init__(self, views: Sequence[str], length: int, embed_dim: int) -> None:
        super().__init__()
        self.places = {view: place for place, view in enumerate(views)}
        self.length = length
        self.register_buffer("rows", torch.zeros(len(views), length, embed_dim))
        self.register_buffer("filled", torch.zeros(len(views), dtype=torch.int64))

    def full_views(self) -> set[str]:
        """The views whose queues hold only features; before, zeros would take part as if they were some."""
        filled = self.filled.tolist()
        return {view for view, place in self.places.items() if filled[place] == self.length}

    def share(self, view: str, rank: int, world: int) -> Tensor:
        """This rank's part of a view's queue, in at least fp32: together the ranks hold each feature once."""
        return in_fp32(self.rows[self.places[view], rank::world])

    def check_batch(self, rows: int) -> None:
        """Refuse a batch that it cannot hold.

        Raises:
            LossError: If the global batch has more rows than the queue.
        """
        if rows > self.length:
            raise LossError(
                f"a queue of {self.length} features is shorter than the batch of {rows}",
                fix="raise queue_length, or lower data.global_batch_size",
            )

    @torch.no_grad()
    def push(self, features: Mapping[str, Tensor]) -> None:
        """Put the features ``[n, D]`` of all ranks in front, per view."""
        for view, new in features.items():
            place = self.places[view]
            self.rows[place] = torch.cat([new.to(self.rows.dtype), self.rows[place]])[: self.length]
            self.filled[place] = (self.filled[place] + len(new)).clamp(max=self.length)


def view_names(modalities: Iterable[str], views: int) -> list[str]:
    """What so many views of each modality are called."""
    return [_view_name(modality, number) for modality in modalities for number in range(views)]


def _view_name(modality: str, number: int) -> str:
    return f"{modality}_{number}"
