"""Samples -> `Batch`: presence is made here, and absent rows become zeros of the right shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrep.batch import Batch, Input
from mmrep.errors import Fault


@dataclass
class Sample:
    """One decoded and transformed sample: the modalities that it has, its labels, and samples that it replaces."""

    key: str
    values: dict[str, Input] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Collate:
    """Stack samples into a batch.

    Args:
        blanks: Per modality what stands for an absent row: zeros in the shape of one transformed sample, so that a batch
            in which nobody has the modality still has its shape.
        labels: Names of the labels; -1 where a sample lacks one.
    """

    blanks: Mapping[str, Input]
    labels: Sequence[str]

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return Batch(
            inputs={name: _stack([s.values.get(name, blank) for s in samples]) for name, blank in self.blanks.items()},
            present={name: torch.tensor([name in s.values for s in samples]) for name in self.blanks},
            keys=[sample.key for sample in samples],
            labels={name: torch.tensor([s.labels.get(name, -1) for s in samples]) for name in self.labels},
            faults=[fault for sample in samples for fault in sample.faults],
        )


def _stack(rows: Sequence[Input]) -> Input:
    first = rows[0]
    if isinstance(first, Tensor):
        return _stack_tensors([row for row in rows if isinstance(row, Tensor)])
    return [torch.stack([row[resolution] for row in rows]) for resolution in range(len(first))]


def _stack_tensors(rows: Sequence[Tensor]) -> Tensor:
    """``[B, ...]``. Pictures whose channels lie last in memory are copied as they lie, and not turned over one by one."""
    if rows[0].ndim == 3 and any(row.stride(0) == 1 != row.stride(2) for row in rows):
        return torch.stack([row.permute(1, 2, 0) for row in rows]).permute(0, 3, 1, 2)
    return torch.stack(list(rows))
