"""What ``mmrep predict`` leaves on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes ``embeddings-rankR.npz``: ``keys [N]``, and per modality ``NAME [N, D]`` and ``NAME_present [N]``.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="epoch")
        self.folder = folder

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        arrays: dict[str, np.ndarray] = {"keys": np.array([key for batch in predictions for key in batch["keys"]])}
        for name in predictions[0]["embeddings"]:
            arrays[name] = torch.cat([batch["embeddings"][name] for batch in predictions]).numpy()
            arrays[f"{name}_present"] = torch.cat([batch["present"][name] for batch in predictions]).numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"embeddings-rank{trainer.global_rank}.npz"
        np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub takes every keyword for allow_pickle
        print(f"{len(arrays['keys'])} samples in {path}")
