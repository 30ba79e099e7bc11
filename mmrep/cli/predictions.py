"""What ``mmrep predict`` leaves on disk."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BasePredictionWriter

from mmrep.errors import ConfigError
from mmrep.files import replacing

KEYS = "keys"


class PredictionWriter(BasePredictionWriter):
    """Writes ``embeddings-rankR.npz``: ``keys [N]``, and per modality ``NAME [N, D]`` and ``NAME_present [N]``.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="epoch")
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_names(pl_module.model.modalities)  # type: ignore[union-attr,arg-type]  # of every module of ours

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        arrays: dict[str, np.ndarray] = {KEYS: np.array([key for batch in predictions for key in batch["keys"]])}
        for name in predictions[0]["embeddings"]:
            arrays[name] = torch.cat([batch["embeddings"][name] for batch in predictions]).numpy()
            arrays[_presence(name)] = torch.cat([batch["present"][name] for batch in predictions]).numpy()
        path = self.folder / f"embeddings-rank{trainer.global_rank}.npz"
        _save(path, arrays)
        print(f"{len(arrays[KEYS])} samples in {path}")


def check_names(modalities: Sequence[str]) -> None:
    """Refuse a modality whose array would take the place of another.

    Raises:
        ConfigError: With its name.
    """
    taken = {KEYS, *map(_presence, modalities)}
    if clash := [name for name in modalities if name in taken]:
        raise ConfigError(
            f"predictions hold an array '{clash[0]}' of their own beside that of modality '{clash[0]}'",
            fix="embed with `mmrep embed`",
        )


def _presence(modality: str) -> str:
    return f"{modality}_present"


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """As np.savez, whose own parameters, ``file`` say, cannot be names of arrays."""
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
