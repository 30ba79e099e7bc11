"""Collectives: the only file of mmrep that speaks to torch.distributed.

A loss takes this rank's rows and needs those of all ranks, with gradients. `gather_rows` does that exactly: its backward
sums over the ranks the gradients of everything that was computed from a row (a reduce-scatter), for any number of rows per
rank. With ``loss_r = W * (terms of the rows of rank r) / (number of rows of all ranks)`` and DDP's mean over W ranks the
gradients equal those of one process with the whole batch, encoders and the loss's own parameters alike.

Only one side of a pair has to travel: a rank compares its own rows of the one with everyone's rows of the other, and the
sums over columns, a number each, are added up by `logsumexp_over_ranks`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmrep.ops.multilinear import in_fp32
from mmrep.ops.step_clock import COMMUNICATION, timed

HALF = (torch.float16, torch.bfloat16)
OF_OTHER_RANKS = re.compile(
    r"gloo/[^\]]*:\d+\] .*(?:closed by peer|reset by peer|Broken pipe|[Tt]imed out|timeout)"
    r"|\bNCCL (?:error|communicator|watchdog)|\bncclRemoteError|Watchdog caught collective operation timeout"
)
"""What gloo and NCCL say of a rank that is gone. gloo names its source: ``[.../gloo/transport/tcp/pair.cc:553] ...``."""
PRESENT, FINITE = 1, 2
"""Bits of what every rank knows of every sample and modality."""


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank's number; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@timed(COMMUNICATION)
def _all_reduce(tensor: Tensor, *operation: Any) -> None:
    """Sum in place, unless another operation is named."""
    dist.all_reduce(tensor, *operation)


@timed(COMMUNICATION)
def _all_gather(everyone: Tensor, own: Tensor) -> None:
    dist.all_gather_into_tensor(everyone, own)


@timed(COMMUNICATION)
def _reduce_scatter(own: Tensor, everyone: Tensor) -> None:
    dist.reduce_scatter_tensor(own, everyone)


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank has."""
    if world_size() == 1:
        return [rows]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = rows
    _all_reduce(counts)
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
    """All-gather forward, reduce-scatter (sum) backward, both on rows padded to the longest rank.

    Half precision travels as it is; the rows that arrive are of fp32, as are the gradients that go back.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts, ctx.dtype = counts, rows.dtype
        longest = max(counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        everyone = rows.new_empty(len(counts) * longest, *rows.shape[1:])
        _all_gather(everyone, padded)
        if min(counts) < longest:
            everyone = torch.cat([part[:count] for part, count in zip(everyone.split(longest), counts, strict=True)])
        return everyone.float() if rows.dtype in HALF else everyone

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        counts, longest = ctx.counts, max(ctx.counts)
        # A fresh contiguous buffer: gloo reads the memory of a strided gradient in the wrong order, without a word.
        padded = grad.new_zeros(len(counts), longest, *grad.shape[1:])
        for part, mine in zip(padded, grad.split(counts), strict=True):
            part[: len(mine)] = mine
        own = grad.new_empty(longest, *grad.shape[1:])
        _reduce_scatter(own, padded.flatten(0, 1))
        return own[: counts[rank()]].to(ctx.dtype), None


def logsumexp_over_ranks(columns: Sequence[Tensor]) -> list[Tensor]:
    """Log-sum-exps over this rank's rows to those over the rows of all ranks, in one go.

    Args:
        columns: Vectors of the same lengths on all ranks; -inf where a rank has nothing to add.

    Returns:
        The same on all ranks. A rank may use any part of them: gradients are summed over ranks.
    """
    if world_size() == 1 or not columns:
        return list(columns)
    together: Tensor = _LogSumExp.apply(torch.cat(list(columns)))
    return list(together.split([len(column) for column in columns]))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        highest = own.clone()
        _all_reduce(highest, dist.ReduceOp.MAX)
        highest.clamp_(min=torch.finfo(own.dtype).min)  # of nothing at all, where the difference were NaN
        total = (own - highest).exp()
        _all_reduce(total)
        everyone = total.log() + highest
        ctx.save_for_backward((own - everyone.clamp(min=torch.finfo(own.dtype).min)).exp())
        return everyone

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (share,) = ctx.saved_tensors
        total = grads[0].clone(memory_format=torch.contiguous_format)
        _all_reduce(total)
        result: Tensor = total * share
        return result


def gather_stacked(tensor: Tensor) -> Tensor:
    """One tensor of equal shape from every rank, ``[W, ...]``, without gradients: statistics, not rows."""
    if world_size() == 1:
        return tensor.detach()[None]
    everyone = tensor.new_empty(world_size() * tensor.numel())
    _all_gather(everyone, tensor.detach().flatten().contiguous())
    return everyone.view(world_size(), *tensor.shape)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradients."""
    total = tensor.detach().clone()
    if world_size() > 1:
        _all_reduce(total)
    return total


@dataclass(frozen=True)
class Selection:
    """The samples of all ranks that have certain modalities.

    Attributes:
        own: Per modality ``[k, D]`` of this rank, with gradients.
        rows: Per modality that travelled ``[K, D]``, with gradients, equal on all ranks.
        mine: Which of the K are this rank's.
        total: K.
        share: How many such terms share the memory that may be kept for a backward pass: see `choose_path`.
    """

    own: dict[str, Tensor]
    rows: dict[str, Tensor]
    mine: slice
    total: int
    share: int = 1

    def mean(self, summed: Tensor) -> Tensor:
        """From a sum over this rank's rows to its share of the mean over all: the mean of the ranks' shares is that mean, and
        so DDP's mean of gradients is exact."""
        return summed * (world_size() / self.total)


@dataclass(frozen=True)
class Gathered:
    """Embeddings of all ranks.

    Attributes:
        own: Per modality ``[n, D]`` of this rank, or ``[n, V, D]`` where it has views.
        rows: Per modality that travelled ``[N, D]`` or ``[N, V, D]`` of all ranks; with one rank, ``own``.
        present: Per modality bool ``[N]``.
        not_finite: Per modality, how many samples of all ranks have NaN or infinity in their rows.
        offset: Number of the first row of this rank.
        on_host: ``present`` in the memory of the CPU, where sizes are decided.
        share: See `Selection`.
    """

    own: dict[str, Tensor]
    rows: dict[str, Tensor]
    present: dict[str, Tensor]
    not_finite: dict[str, int]
    offset: int
    on_host: dict[str, Tensor]
    share: int = 1

    def select(self, names: Iterable[str]) -> Selection:
        """The samples that have all of ``names``, in order: what a term of a loss is made of."""
        names = list(names)
        local = len(self.own[names[0]])
        complete = torch.stack([self.on_host[name] for name in names]).all(dim=0)
        mine = complete[self.offset : self.offset + local]
        before, here, total = int(complete[: self.offset].sum()), int(mine.sum()), int(complete.sum())
        own = {name: _where(self.own[name], mine, here) for name in names}
        rows = {
            name: own[name] if self.rows[name] is self.own[name] else _where(self.rows[name], complete, total)
            for name in names
            if name in self.rows
        }
        return Selection(own, rows, slice(before, before + here), total, self.share)

    def tensors(self) -> list[Tensor]:
        """All rows that have gradients, each once."""
        travelled = [rows for name, rows in self.rows.items() if rows is not self.own[name]]
        return [*self.own.values(), *travelled]

    def view(self, number: int) -> Gathered:
        """View ``number`` of every modality, as rows ``[N, D]``; a modality with one view lends it to all."""

        def one(rows: Tensor) -> Tensor:
            return rows if rows.ndim == 2 else rows[:, number if rows.shape[1] > 1 else 0]

        own = {name: one(rows) for name, rows in self.own.items()}
        rows = {name: own[name] if rows is self.own[name] else one(rows) for name, rows in self.rows.items()}
        views = max(rows.shape[1] if rows.ndim == 3 else 1 for rows in self.own.values())
        return replace(self, own=own, rows=rows, share=self.share * views)


def _where(rows: Tensor, mask: Tensor, count: int) -> Tensor:
    """The rows of a mask on the host; all of them are not copied."""
    return rows if count == len(rows) else rows[mask.nonzero()[:, 0].to(rows.device)]


def gather_embeddings(
    embeddings: Mapping[str, Tensor],
    present: Mapping[str, Tensor] | None = None,
    travelling: Iterable[str] | None = None,
) -> Gathered:
    """Gather modalities, and the presence of all of them.

    They travel in one collective: every rank then runs the same collectives, forward and backward, whatever its batch lacks,
    and their order cannot differ between ranks.

    Args:
        embeddings: Modality -> this rank's rows ``[n_r, D]`` or views ``[n_r, V, D]``; the same modalities, V and D on all
            ranks. V may differ between modalities. Half precision travels as it is, and is widened where it arrives.
        present: Modality -> bool ``[n_r]``; all present where None.
        travelling: The modalities whose rows every rank needs; all where None.
    """
    own = {name: in_fp32(rows) for name, rows in embeddings.items()}
    first = next(iter(own.values()))
    counts = row_counts(len(first), first.device)
    needed = set(embeddings if travelling is None else travelling)
    names = [name for name in embeddings if name in needed]
    rows = dict(own) if world_size() == 1 else _gather_together({name: embeddings[name] for name in names}, counts)
    flags = gather_rows(torch.stack([_flags(name, r, present) for name, r in own.items()], dim=1), counts)
    host = flags.cpu()
    return Gathered(
        own,
        {name: rows[name] for name in names},
        {name: (flags[:, i] & PRESENT).bool() for i, name in enumerate(own)},
        dict(zip(own, (host & FINITE == 0).sum(dim=0).tolist(), strict=True)),
        sum(counts[: rank()]),
        {name: (host[:, i] & PRESENT).bool() for i, name in enumerate(own)},
    )


def _flags(name: str, rows: Tensor, present: Mapping[str, Tensor] | None) -> Tensor:
    """What every rank must know of this rank's samples, a byte each."""
    nothing = (rows.detach() * 0).flatten(1).sum(dim=1)  # NaN where a number is NaN or infinite; faster than isfinite
    finite = (nothing == 0).to(torch.uint8) * FINITE
    return finite + (PRESENT if present is None else present[name].to(torch.uint8) * PRESENT)


def _gather_together(embeddings: Mapping[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """Rows of all ranks, of several modalities, in one collective."""
    if not embeddings:
        return {}
    views = {name: rows if rows.ndim == 3 else rows[:, None] for name, rows in embeddings.items()}
    together = gather_rows(torch.cat(list(views.values()), dim=1), counts)
    everyone = together.split([rows.shape[1] for rows in views.values()], dim=1)
    return {
        name: rows if embeddings[name].ndim == 3 else rows[:, 0] for name, rows in zip(views, everyone, strict=True)
    }


def shared_store() -> Any:
    """A connection of its own to the key-value store that the ranks met at, usable from any thread; None with one rank.

    Unlike a collective it answers while the ranks wait for each other, and says so when its host is gone.
    """
    store: Any = dist.distributed_c10d._get_default_store() if world_size() > 1 else None
    return None if store is None else store.clone()


def open_store(host: str, port: int, is_host: bool, seconds: float) -> Any:
    """The key-value store at an address, before there is a process group; one made there later shares it.

    Args:
        is_host: Whether this process holds it, for as long as it keeps what it is given here.
        seconds: To wait for the host.
    """
    timeout = timedelta(seconds=seconds)
    make: Any = dist.TCPStore  # type: ignore[attr-defined]  # exported where torch has torch.distributed
    return make(host, port, None, is_host, timeout, wait_for_workers=False, multi_tenant=True)


def is_of_other_ranks(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank is gone or did not come, and nothing of this one."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and world_size() > 1 and OF_OTHER_RANKS.search(str(error)) is not None
    )
