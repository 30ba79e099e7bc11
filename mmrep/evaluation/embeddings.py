"""`Embeddings`: a whole split as rows, with what evaluation must know of each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrep.batch import Batch
from mmrep.errors import MmrepError
from mmrep.model import MultimodalModel
from mmrep.ops.gather import gather_rows


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
        mine = self.result()

        def everyone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: gather_rows(tensor.to(device)) for name, tensor in tensors.items()}

        present = {name: mask.to(torch.uint8) for name, mask in mine.present.items()}
        return Embeddings(
            everyone(mine.rows), {n: mask.bool() for n, mask in everyone(present).items()}, everyone(mine.labels)
        )


@torch.inference_mode()
def embed_loader(
    model: MultimodalModel, loader: Iterable[Batch], *, advance: Callable[[int], None] | None = None
) -> Embeddings:
    """Embed every sample of a loader with a model in evaluation mode.

    Args:
        model: The model; inputs are moved to its device.
        loader: Batches.
        advance: Called with the number of samples done, for a progress bar.
    """
    device = next(model.parameters()).device
    collector = EmbeddingCollector()
    model.eval()
    for batch in loader:
        collector.add(batch, model(batch.to(device).inputs))
        if advance is not None:
            advance(len(batch))
    return collector.result()
