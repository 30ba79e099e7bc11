"""Ranks that would begin at different places end before the first step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from mmrep.errors import CheckpointError, ConfigError
from mmrep.ops.gather import gather_stacked, rank
from mmrep.stable_hash import stable_hash

NODE = {
    "data": ("path", "eval_path", "cache_dir", "cache_gb", "num_workers", "quarantine"),
    "trainer": ("devices", "num_nodes", "default_root_dir", "logger", "callbacks", "enable_progress_bar"),
    "checkpoint": ("dirpath",),
}
"""Settings by section that a node may have for itself: paths of its own disks, and what does not change the steps."""


class SameStart(Callback):
    """Compares over the ranks what a run begins with: its checkpoint, its config and its data.

    Nodes without a shared file system may have other files, or other configs. Without this a rank that found no checkpoint
    would begin at step 0 beside others in the middle, with their weights and its own optimiser, and nothing would fail.

    Args:
        checkpoint: What this rank goes on from, or None.
        config: Of this rank: section -> settings.
    """

    def __init__(self, checkpoint: str | None, config: Mapping[str, Any]) -> None:
        self.checkpoint = checkpoint
        sections = ("seed_everything", "trainer", "model", "data", "checkpoint")
        self.sections = {name: _shared(name, config[name]) for name in sections}
        self.sections["trainer.callbacks"] = _text(_classes(config["trainer"]["callbacks"]))
        self.sections["checkpoint_minutes"] = _text(config["checkpoint_minutes"] > 0)  # the first rank's clock decides

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning calls this when the process group is there and nothing has been loaded.

        Raises:
            CheckpointError: On every rank, if one of them has another checkpoint.
            ConfigError: On every rank, if one of them has another config or other shards.
        """
        shards = trainer.datamodule.state_dict() if stage == "fit" else {}  # type: ignore[attr-defined]  # Lightning sets it
        mine = {"start": _file(self.checkpoint), **self.sections, "contents of the shards": _text(shards)}
        marks = torch.tensor([stable_hash(text) for text in mine.values()], device=trainer.strategy.root_device)
        differ = (gather_stacked(marks) != marks).T.tolist()
        for name, others in zip(mine, differ, strict=True):
            ranks = ", ".join(str(number) for number, other in enumerate(others) if other)
            if ranks and name == "start":
                raise CheckpointError(
                    f"rank {rank()} starts from {mine[name]}, not so rank {ranks}",
                    fix="put the run folder (--runs) where all nodes see it, or copy the checkpoint to every node",
                )
            if ranks:
                raise ConfigError(
                    f"rank {rank()} has another '{name}' than rank {ranks}",
                    fix="start all nodes with the same config and the same shards",
                )


def _shared(section: str, settings: Any) -> str:
    """The settings of a section that must be equal on all ranks, as text."""
    if not isinstance(settings, Mapping):
        return _text(settings)
    return _text({name: value for name, value in settings.items() if name not in NODE.get(section, ())})


def _classes(callbacks: Any) -> list[str]:
    """Of the callbacks that a config names: none, one or a list. Their settings may hold paths."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [str(callback["class_path"]) for callback in listed]


def _file(path: str | None) -> str:
    return f"{Path(path).name} of {Path(path).stat().st_size} bytes" if path else "no checkpoint"


def _text(settings: Any) -> str:
    return json.dumps(settings, sort_keys=True, default=str)
