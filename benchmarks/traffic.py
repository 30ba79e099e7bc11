"""Bytes that a rank sends in a step of CLIP's loss, counted at every collective: ours and open_clip's."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmrep.losses import PairwiseCLIPLoss

RANKS, ROWS, WIDTH = 4, 256, 512


class Traffic:
    """Counts what one rank sends, as rings do: each part that another rank needs leaves a rank once."""

    def __init__(self) -> None:
        self.sent = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While it counts."""
        others = (dist.get_world_size() - 1) / dist.get_world_size()
        sizes: dict[str, Callable[..., float]] = {
            "all_gather": lambda out, *_: others * sum(_bytes(part) for part in out),
            "all_gather_into_tensor": lambda out, *_: others * _bytes(out),
            "reduce_scatter_tensor": lambda _, whole, *__: others * _bytes(whole),
            "all_reduce": lambda tensor, *_: 2 * others * _bytes(tensor),
            "all_to_all": lambda _, parts, *__: others * sum(_bytes(part) for part in parts),
            "scatter": lambda tensor, *_: (
                others * _bytes(tensor)
            ),  # gloo has no all_to_all of lists: W scatters stand for it
        }
        with ExitStack() as stack:
            for name, size in sizes.items():
                stack.enter_context(patch.object(dist, name, self._wrap(getattr(dist, name), size)))
            yield

    def _wrap(self, collective: Callable[..., Any], size: Callable[..., float]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.sent += size(*arguments)
            return collective(*arguments, **options)

        return call


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_sent(side: str, dtype: torch.dtype) -> float:
    """Of rank 0, in one step.

    Args:
        side: ``ours`` or ``theirs``.
        dtype: Of the rows, as the encoders leave them.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        results = context.SimpleQueue()
        ranks = [
            context.Process(target=_rank, args=(rank, Path(folder) / "store", side, dtype, results))
            for rank in range(RANKS)
        ]
        for process in ranks:
            process.start()
        sent = float(results.get())
        for process in ranks:
            process.join()
    return sent


def _rank(rank: int, store: Path, side: str, dtype: torch.dtype, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.manual_seed(rank)
    x, y = (F.normalize(torch.randn(ROWS, WIDTH), dim=1).to(dtype).requires_grad_() for _ in range(2))
    traffic = Traffic()
    with traffic.counted():
        _step(side, x, y, rank).backward()
    if rank == 0:
        results.put(traffic.sent)
    dist.barrier()
    dist.destroy_process_group()


def _step(side: str, x: Tensor, y: Tensor, rank: int) -> Tensor:
    if side == "ours":
        loss: Tensor = PairwiseCLIPLoss()({"image": x, "text": y}).loss
        return loss
    from open_clip.loss import ClipLoss

    theirs = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=RANKS)
    loss = theirs(x, y, torch.tensor(14.3, dtype=x.dtype, requires_grad=True))
    return loss
