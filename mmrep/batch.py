"""`Batch`: what the data layer hands to a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrep.errors import Fault

Input = Tensor | list[Tensor]
"""One modality of a batch: ``[B, ...]``, or a list of such tensors, one per resolution (multi-crop)."""


@dataclass
class Batch:
    """``B`` samples of any modalities.

    Attributes:
        inputs: Per modality a dense tensor ``[B, ...]`` (zeros where absent), or a list of them, one per resolution.
        present: Per modality a bool tensor ``[B]``: which samples have it.
        keys: The samples' keys. An empty key marks padding: a row that belongs to no sample and has no modality.
        labels: Per label an int64 tensor ``[B]``; -1 where a sample has none. ``@group`` names the samples that are
            right answers to each other, and ``@content:MODALITY`` is a digest of the raw bytes.
        faults: Samples that were planned for this batch and could not be used.
    """

    inputs: dict[str, Input]
    present: dict[str, Tensor]
    keys: list[str]
    labels: dict[str, Tensor] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on ``device``."""

        def move(value: Input) -> Input:
            if isinstance(value, list):
                return [tensor.to(device, non_blocking=non_blocking) for tensor in value]
            return value.to(device, non_blocking=non_blocking)

        return Batch(
            inputs={name: move(value) for name, value in self.inputs.items()},
            present={name: mask.to(device, non_blocking=non_blocking) for name, mask in self.present.items()},
            keys=self.keys,
            labels={name: label.to(device, non_blocking=non_blocking) for name, label in self.labels.items()},
            faults=self.faults,
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, so that the copy to a GPU can overlap with work."""

        def pin(value: Input) -> Input:
            return [tensor.pin_memory() for tensor in value] if isinstance(value, list) else value.pin_memory()

        return Batch(
            inputs={name: pin(value) for name, value in self.inputs.items()},
            present={name: mask.pin_memory() for name, mask in self.present.items()},
            keys=self.keys,
            labels={name: label.pin_memory() for name, label in self.labels.items()},
            faults=self.faults,
        )
