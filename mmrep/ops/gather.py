"""Collectives: the only file of mmrep that speaks to torch.distributed.

A loss takes this rank's rows and needs those of all ranks, with gradients. `gather_rows` does that exactly: its backward
sums over the ranks the gradients of everything that was computed from a row (a reduce-scatter), for any number of rows per
rank. With ``loss_r = W * (terms of the rows of rank r) / (number of rows of all ranks)`` and DDP's mean over W ranks the
gradients equal those of one process with the whole batch, encoders and the loss's own parameters alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank's number; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank has."""
    if world_size() == 1:
        return [rows]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = rows
    dist.all_reduce(counts)
    return [int(count) for count in counts.tolist()]


def gather_rows(rows: Tensor, counts: list[int] | None = None) -> Tensor:
    """The rows of all ranks, in rank order.

    Args:
        rows: ``[n_r, ...]`` of this rank; ``n_r`` may differ between ranks, and be 0.
        counts: What `row_counts` said, where the caller has asked already.

    Returns:
        ``[sum of n_r, ...]``, equal on all ranks. Gradients flow back to the rank that a row came from, summed over ranks.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, counts or row_counts(len(rows), rows.device))
    return gathered


class _GatherRows(torch.autograd.Function):
    """All-gather forward, reduce-scatter (sum) backward, both on rows padded to the longest rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = rows.new_empty(len(counts) * longest, *rows.shape[1:])
        dist.all_gather_into_tensor(everyone, padded)
        return (
            torch.cat([part[:count] for part, count in zip(everyone.split(longest), counts, strict=True)])
            if longest
            else everyone
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        counts, longest = ctx.counts, max(ctx.counts)
        # A fresh contiguous buffer: gloo reads the memory of a strided gradient in the wrong order, without a word.
        padded = grad.new_zeros(len(counts), longest, *grad.shape[1:])
        for part, mine in zip(padded, grad.split(counts), strict=True):
            part[: len(mine)] = mine
        own = grad.new_empty(longest, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
        return own[: counts[rank()]], None


def gather_stacked(tensor: Tensor) -> Tensor:
    """One tensor of equal shape from every rank, ``[W, ...]``, without gradients: statistics, not rows."""
    if world_size() == 1:
        return tensor.detach()[None]
    everyone = tensor.new_empty(world_size() * tensor.numel())
    dist.all_gather_into_tensor(everyone, tensor.detach().flatten().contiguous())
    return everyone.view(world_size(), *tensor.shape)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradients."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


@dataclass(frozen=True)
class Selection:
    """The samples of all ranks that have certain modalities.

    Attributes:
        rows: Per modality ``[K, D]`` with gradients, equal on all ranks.
        mine: Which of the K are this rank's.
        total: K.
    """

    rows: dict[str, Tensor]
    mine: slice
    total: int

    def mean(self, summed: Tensor) -> Tensor:
        """From a sum over this rank's rows to its share of the mean over all: the mean of the ranks' shares is that mean, and
        so DDP's mean of gradients is exact."""
        return summed * (world_size() / self.total)


@dataclass(frozen=True)
class Gathered:
    """Embeddings of all ranks.

    Attributes:
        rows: Per modality ``[N, D]``, or ``[N, V, D]`` where it has views, with gradients.
        present: Per modality bool ``[N]``.
        offset: Number of the first row of this rank.
        local: How many rows this rank has.
    """

    rows: dict[str, Tensor]
    present: dict[str, Tensor]
    offset: int
    local: int

    def select(self, names: Iterable[str]) -> Selection:
        """The samples that have all of ``names``, in order: what a term of a loss is made of."""
        names = list(names)
        complete = torch.stack([self.present[name] for name in names]).all(dim=0)
        before, mine, total = torch.stack(
            [complete[: self.offset].sum(), complete[self.offset : self.offset + self.local].sum(), complete.sum()]
        ).tolist()
        return Selection({name: self.rows[name][complete] for name in names}, slice(before, before + mine), total)

    def view(self, number: int) -> Gathered:
        """View ``number`` of every modality, as rows ``[N, D]``; a modality with one view lends it to all."""
        rows = {
            name: rows if rows.ndim == 2 else rows[:, number if rows.shape[1] > 1 else 0]
            for name, rows in self.rows.items()
        }
        return Gathered(rows, self.present, self.offset, self.local)


def gather_embeddings(embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> Gathered:
    """Gather all modalities and their presence.

    All modalities travel in one collective: every rank then runs the same collectives, forward and backward, whatever its
    batch lacks, and their order cannot differ between ranks.

    Args:
        embeddings: Modality -> this rank's rows ``[n_r, D]`` or views ``[n_r, V, D]``; the same modalities, V and D on all
            ranks. V may differ between modalities.
        present: Modality -> bool ``[n_r]``; all present where None.
    """
    names = list(embeddings)
    views = {name: rows if rows.ndim == 3 else rows[:, None] for name, rows in embeddings.items()}
    together = torch.cat(list(views.values()), dim=1)
    counts = row_counts(len(together), together.device)
    everyone = gather_rows(together, counts).split([rows.shape[1] for rows in views.values()], dim=1)
    masks = [
        torch.ones(len(together), dtype=torch.bool, device=together.device) if present is None else present[n]
        for n in names
    ]
    has = gather_rows(torch.stack(masks, dim=1).to(torch.uint8), counts).bool()
    return Gathered(
        {name: rows if embeddings[name].ndim == 3 else rows[:, 0] for name, rows in zip(names, everyone, strict=True)},
        {name: has[:, i] for i, name in enumerate(names)},
        sum(counts[: rank()]),
        len(together),
    )
