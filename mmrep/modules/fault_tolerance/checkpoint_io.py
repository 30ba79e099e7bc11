"""Checkpoints that a fault at any moment leaves whole: the earlier one, or the new one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_fabric.utilities.cloud_io import _is_local_file_protocol

from mmrep.errors import CheckpointError
from mmrep.files import replacing
from mmrep.weights import read_torch_file


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, waits for the disk, and renames it.

    A checkpoint that cannot be written (no room, no permission, a broken disk) does not end the training: it is reported on
    stderr in a line each time, and no earlier checkpoint is removed until one has been written again. `check` ends a run whose
    last checkpoint is missing.

    Attributes:
        failed: What kept the last checkpoint from being written; None where it was written.
        last: The checkpoint that was written last.
    """

    def __init__(self) -> None:
        self.failed: str | None = None
        self.last: Path | None = None
        self._spared: dict[str, None] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, or report why not. Only the first rank writes; the others wait for it."""
        if not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(Path(path), sync=True) as part, part.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause = _of_the_disk(error)
            if cause is None:
                raise
            self._report(checkpoint.get("global_step"), path, cause)
            return
        self.failed, self.last = None, Path(path)
        self._spared.pop(os.fspath(path), None)
        for earlier in list(self._spared):
            self.remove_checkpoint(earlier)
        self._spared.clear()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint. Nothing in it is run, whatever is asked for.

        Raises:
            CheckpointError: If it is damaged, or holds more than tensors and plain data.
        """
        content: dict[str, Any] = read_torch_file(path)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint that a newer one replaces, if there is a newer one."""
        if self.failed is not None:
            self._spared[os.fspath(path)] = None
            return
        try:
            super().remove_checkpoint(path)
        except OSError as error:
            print(f"mmrep: warning: cannot be removed ({error.strerror}) [{path}]", file=sys.stderr, flush=True)

    def keep(self, path: str) -> None:
        """Spare a checkpoint for good that was to be removed for one that could not be written."""
        self._spared.pop(path, None)

    def check(self) -> None:
        """Complain if the last checkpoint is missing.

        Raises:
            CheckpointError: With the reason, and the newest one that was written.
        """
        if self.failed is not None:
            newest = f"the newest one is {self.last}" if self.last else "this start has written none"
            raise CheckpointError(
                f"the last checkpoint could not be written: {self.failed}; {newest}",
                fix="make room, or copy the run folder to another --runs, then go on with --resume auto",
            )

    def _report(self, step: int | None, path: str | Path, cause: OSError) -> None:
        self.failed = f"{cause.strerror or cause} [{path}]"
        print(
            f"mmrep: warning: no checkpoint at step {step}: {self.failed}; the training goes on and earlier ones are kept",
            file=sys.stderr,
            flush=True,
        )


def _of_the_disk(error: BaseException) -> OSError | None:
    """The file system's error behind what `torch.save` raised, which hides it behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause
