"""``--resume auto``: the newest checkpoint that is whole."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from mmrep.cli.launch import is_first
from mmrep.errors import CheckpointError
from mmrep.interop.load import CONFIG_KEY

WEIGHTS_ALONE = "hold weights alone"
"""Of a checkpoint by ``checkpoint.save_weights_only``, which no run can go on from."""


def newest_intact(folder: Path) -> Path | None:
    """The checkpoint with the most progress among those that can be read whole.

    Progress is what the files say, not their times, which copies and clocks change. All ranks of one file system find the same.
    Nothing is removed; each file that is passed over is named on stderr.

    Args:
        folder: ``checkpoints/`` of a run.

    Returns:
        None where the folder holds no checkpoint at all.

    Raises:
        CheckpointError: If there are checkpoints and none is whole.
    """
    files = sorted(path for path in folder.glob("*.ckpt") if path.is_file())
    reasons: list[str] = []
    progress: dict[Path, tuple[int, ...]] = {}
    for path in files:
        try:
            progress[path] = _progress(path)
        except Exception as error:  # whatever a reader meets in damaged bytes
            reasons.append(str(error) if isinstance(error, CheckpointError) else "not a whole checkpoint")
            _pass_over(path, reasons[-1])
    for path in sorted(progress, key=lambda path: (progress[path], path.name), reverse=True):
        damaged = _damage(path)
        if damaged is None:
            return path
        _pass_over(path, damaged)
    if files:
        alone = reasons.count(WEIGHTS_ALONE) == len(files)
        raise CheckpointError(
            f"{'all' if alone else 'none'} of the {len(files)} checkpoints {WEIGHTS_ALONE if alone else 'is whole'}",
            where=folder,
            fix="copy a whole one there, or train anew with --overwrite or another --name",
        )
    return None


def is_ours(path: Path) -> bool:
    """Whether a file can be read as a checkpoint of mmrep, be it weights alone."""
    try:
        _read(path)
    except Exception:  # whatever a reader meets in the bytes of others
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    """Tensors are mapped, not read."""
    content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or CONFIG_KEY not in content or "state_dict" not in content:
        raise CheckpointError("not a checkpoint of mmrep")
    return content


def _progress(path: Path) -> tuple[int, ...]:
    """Steps, epochs and batches done when it was written."""
    content = _read(path)
    if "optimizer_states" not in content or "loops" not in content:
        raise CheckpointError(WEIGHTS_ALONE)
    fit = content["loops"]["fit_loop"]
    epochs, batches = fit["epoch_progress"]["total"], fit["epoch_loop.batch_progress"]["total"]
    validation = fit["epoch_loop.val_loop.batch_progress"]["total"]
    return (
        int(content["global_step"]),
        *(int(counts[name]) for name in ("processed", "completed") for counts in (epochs, batches, validation)),
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a file whose table of contents can be read: every byte is compared with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        return f"not a whole file ({error})"
    return None if member is None else f"damaged at {member}"


def _pass_over(path: Path, reason: str) -> None:
    if is_first():
        print(f"mmrep: warning: passed over, {reason} [{path}]", file=sys.stderr, flush=True)
