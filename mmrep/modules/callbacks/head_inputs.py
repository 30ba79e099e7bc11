"""`HeadInputs`: a backbone's features, taken from a forward pass that runs in any case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mmrep.batch import Batch, Input
from mmrep.errors import MmrepError
from mmrep.model import MultimodalModel


class HeadInputs:
    """What enters the projection head of one modality's encoder, of each batch, without gradient.

    The rows of a batch come in order, at once or in parts, and the first so many are taken: gradient caching and activation
    checkpointing send them through again in the backward pass. Where modalities share an encoder, the rows of those that are
    encoded before are passed over.

    Args:
        model: Whose encoder.
        modality: Which.
    """

    def __init__(self, model: MultimodalModel, modality: str) -> None:
        known = model.by_modality
        self.encoder, self.modality = known[modality], modality
        order = list(known)
        self._sharing = [
            name for name in order[: order.index(modality)] if known[name] is self.encoder
        ]  # encoded before it, in the order of `MultimodalModel.forward`
        self._handle: RemovableHandle | None = None
        self._parts: list[Tensor] = []
        self._seen = self._skip = self._wanted = 0

    def attach(self) -> None:
        """Begin to watch."""
        self.detach()
        self._handle = self.encoder.head.register_forward_pre_hook(self._watch)
        if self.encoder._compiled_call_impl is not None:
            torch.compiler.reset()  # what was compiled before, for an encoder of this class, does not know of it

    def detach(self) -> None:
        """Stop watching."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._parts = None, []

    def expect(self, batch: Batch) -> None:
        """Forget what was seen; a batch goes through the model next."""
        self._parts, self._seen = [], 0
        self._skip = sum(_rows(batch.inputs[name]) for name in self._sharing if name in batch.inputs)
        self._wanted = _rows(batch.inputs[self.modality])

    def take(self, batch: Batch) -> Tensor:
        """Features ``[B, F]`` in fp32; of a sample with views, of the first.

        Raises:
            MmrepError: If the batch did not come by.
        """
        parts, self._parts = self._parts, []
        if self._seen < self._skip + self._wanted:
            raise MmrepError(
                f"the features of '{self.modality}' were not seen in this step: its encoder's head is not called as a module",
                fix="leave the callback out",
            )
        rows = torch.cat(parts)[self._skip : self._skip + self._wanted].float()
        return rows.unflatten(0, (len(batch), -1))[:, 0] if len(batch) else rows

    # A compiled encoder breaks its graph here: traced, each new count would compile it anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _watch(self, head: Any, inputs: tuple[Tensor, ...]) -> None:
        if self._seen < self._skip + self._wanted:
            self._parts.append(inputs[0].detach())
            self._seen += len(inputs[0])


def _rows(inputs: Input) -> int:
    """How many rows go through the head: one a sample, or one for each of its views."""
    return len(inputs) if isinstance(inputs, Tensor) else sum(views.shape[0] * views.shape[1] for views in inputs)
