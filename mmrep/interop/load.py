"""`mmrep.load`: from a path to a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmrep.errors import CheckpointError
from mmrep.model import MultimodalModel, load_weights

CONFIG_KEY = "mmrep_model"
"""Where a Lightning checkpoint of mmrep keeps the model's config."""
WEIGHTS_PREFIX = "model."


def load(source: str | Path, *, classes: Mapping[str, type] | None = None) -> MultimodalModel:
    """Load a trained model, ready to encode.

    Args:
        source: A run folder (its ``model/``), a model folder, or a Lightning ``.ckpt`` that mmrep wrote.
        classes: Encoders and losses of your own that the model uses, by name.

    Raises:
        CheckpointError: If there is no such model, or it is broken.
    """
    path = Path(source)
    if path.is_file():
        return _load_lightning(path, classes)
    if (path / "model" / "config.json").is_file():
        return MultimodalModel.from_pretrained(path / "model", classes)
    if (path / "config.json").is_file():
        return MultimodalModel.from_pretrained(path, classes)
    if (path / "config.yaml").is_file():
        raise CheckpointError(
            "the run has no model yet", where=path, fix="give one of its checkpoints/*.ckpt, or let it finish"
        )
    raise CheckpointError("no model", where=source, fix="give a run folder, a model folder, or a .ckpt file")


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a Lightning checkpoint without running anything in it.

    Raises:
        CheckpointError: If it is damaged, holds more than tensors and plain data, or is not mmrep's.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"not a safe, whole checkpoint ({reason[0][:100]})", where=path) from error
    if not isinstance(checkpoint, dict) or CONFIG_KEY not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError("not a checkpoint of mmrep", where=path, fix="give a file that `mmrep fit` wrote")
    return checkpoint


def _load_lightning(path: Path, classes: Mapping[str, type] | None) -> MultimodalModel:
    checkpoint = read_checkpoint(path)
    model = MultimodalModel.from_config(checkpoint[CONFIG_KEY], classes)
    weights = {
        name.removeprefix(WEIGHTS_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }
    load_weights(model, weights, where=path)
    return model.eval()
