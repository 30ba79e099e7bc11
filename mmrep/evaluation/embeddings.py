"""`Embeddings`: a whole split as rows, with what evaluation must know of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrep.batch import Batch
from mmrep.encoders.base import placed
from mmrep.errors import MmrepError
from mmrep.model import MultimodalModel
from mmrep.ops.gather import gather_rows, world_size


@dataclass
class Embeddings:
    """Rows of N samples, fp32.

    Attributes:
        rows: Modality -> ``[N, D]``.
        present: Modality -> bool ``[N]``.
        labels: As in `Batch`, int64 ``[N]`` each.
        keys: The samples' keys; empty after a gather over ranks, which moves tensors only.
    """

    rows: dict[str, Tensor]
    present: dict[str, Tensor]
    labels: dict[str, Tensor]
    keys: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def to(self, device: torch.device | str) -> Embeddings:
        """The same on ``device``, where what is done with them runs."""

        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return Embeddings(move(self.rows), move(self.present), move(self.labels), self.keys)

    def gathered(self) -> Embeddings:
        """The rows of all ranks, each sample once; without keys where there are several. A collective: every rank calls it."""
        if world_size() == 1:
            return self

        def everyone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: gather_rows(tensor) for name, tensor in tensors.items()}

        present = {name: mask.to(torch.uint8) for name, mask in self.present.items()}
        return Embeddings(
            everyone(self.rows), {n: mask.bool() for n, mask in everyone(present).items()}, everyone(self.labels)
        )


class EmbeddingCollector:
    """Gathers the embeddings of batch after batch; rows of padding are dropped."""

    def __init__(self) -> None:
        self._parts: list[Embeddings] = []

    def add(self, batch: Batch, rows: Mapping[str, Tensor]) -> None:
        """Keep one batch's rows ``{modality: [B, D]}``."""
        real = torch.tensor([bool(key) for key in batch.keys], dtype=torch.bool)

        def keep(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().cpu()[real] for name, tensor in tensors.items()}

        keys = [key for key in batch.keys if key]
        self._parts.append(
            Embeddings(keep({n: r.float() for n, r in rows.items()}), keep(batch.present), keep(batch.labels), keys)
        )

    def result(self) -> Embeddings:
        """All rows so far, in order, of this rank."""
        if not self._parts:
            raise MmrepError("there is nothing to evaluate: the split gave no batch")
        first = self._parts[0]
        return Embeddings(
            {name: torch.cat([part.rows[name] for part in self._parts]) for name in first.rows},
            {name: torch.cat([part.present[name] for part in self._parts]) for name in first.present},
            {name: torch.cat([part.labels[name] for part in self._parts]) for name in first.labels},
            [key for part in self._parts for key in part.keys],
        )

    def gathered(self, device: torch.device | str = "cpu") -> Embeddings:
        """The rows of all ranks on ``device``, each sample once. A collective: every rank calls it."""
        return self.result().to(device).gathered()


@torch.inference_mode()
def embed_loader(
    model: MultimodalModel, loader: Iterable[Batch], *, advance: Callable[[int], None] | None = None
) -> Embeddings:
    """Embed every sample of a loader with a model in evaluation mode; encoders see only the rows that are there.

    Args:
        model: The model; inputs are moved to its device.
        loader: Batches, of some or all of the model's modalities.
        advance: Called with the number of samples done, for a progress bar.

    Returns:
        The embeddings of this rank's samples, on the CPU. The model is left in evaluation mode.
    """
    device = next(model.parameters()).device
    collector = EmbeddingCollector()
    model.eval()
    for batch in loader:
        collector.add(batch, {name: _embed(model, batch, name, device) for name in batch.inputs})
        if advance is not None:
            advance(len(batch))
    return collector.result()


def _embed(model: MultimodalModel, batch: Batch, name: str, device: torch.device) -> Tensor:
    """Rows ``[B, D]`` of one modality, on the CPU; zeros where it is absent."""
    there, inputs = batch.present[name].cpu(), batch.inputs[name]
    assert isinstance(inputs, Tensor), "in evaluation a sample comes once"
    rows = torch.zeros(len(batch), model.embed_dim)
    if bool(there.any()):
        rows[there] = model({name: placed(inputs[there], model.by_modality[name], device)})[name].float().cpu()
    return rows
