"""A callback that notes what a long run holds on to: memory, open files, bytes of metrics.csv."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class SoakWatch(Callback):
    """Appends a line to ``rankR.jsonl`` every some steps.

    Args:
        folder: For that file.
        every: Steps between two lines.
    """

    def __init__(self, folder: str, every: int = 25) -> None:
        self.folder, self.every = Path(folder), every

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note this process and its children: the workers of the loaders."""
        if trainer.global_step % self.every:
            return
        processes = [os.getpid(), *children(os.getpid())]
        metrics = Path(str(trainer.log_dir), "metrics.csv") if trainer.log_dir else None
        line = {
            "step": trainer.global_step,
            "processes": len(processes),
            "memory": sum(private_memory(process) for process in processes),
            "files": sum(open_files(process) for process in processes),
            "metrics": metrics.stat().st_size if metrics and metrics.exists() else 0,
        }
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def children(process: int) -> list[int]:
    """The processes that a process has started and that are alive."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def private_memory(process: int) -> int:
    """Resident bytes that are no file; of pages that a fork left to several processes, this one's share."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    return 0


def open_files(process: int) -> int:
    """How many files a process has open. Not counted: tensors that are on their way from a worker."""
    count = 0
    with suppress(FileNotFoundError):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed while we look
                count += "/dev/shm/" not in str(descriptor.readlink())
    return count
