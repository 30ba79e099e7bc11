"""Ranks as torchrun starts them, each in a process of its own that may be killed; forked, since imports cost 20 CPU-seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmrep.batch import Batch
from mmrep.cli import main


@dataclass
class Ranks:
    """Some processes of one run.

    Attributes:
        processes: By rank.
        logs: What each wrote to stdout and stderr.
    """

    processes: list[Any]
    logs: list[Path]
    codes: list[int] = field(default_factory=list)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes; negative where a signal ended a process.

        Raises:
            TimeoutError: If one does not end; all are killed then.
        """
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hanging:
            self.processes[rank].kill()
        if hanging:
            raise TimeoutError(f"rank {hanging} still runs after {timeout} s\n{self.text()}")
        self.codes = [int(process.exitcode) for process in self.processes]
        return self.codes

    def text(self, rank: int | None = None) -> str:
        """What one rank, or all, wrote."""
        return "".join(path.read_text() for path in (self.logs if rank is None else [self.logs[rank]]))

    def errors(self, rank: int) -> list[str]:
        """The lines of mmrep's own errors of a rank."""
        return [line for line in self.text(rank).splitlines() if line.startswith("mmrep: error: ")]


def launch(
    arguments: list[str], folder: Path, world: int = 2, before: Sequence[Callable[[], object] | None] = ()
) -> Ranks:
    """Start ``mmrep`` with these arguments on ``world`` ranks.

    Args:
        folder: For the logs.
        before: By rank, what a process does before: prepare a fault, say.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    start = len(list(folder.glob("*.log")))
    logs = [folder / f"{start + rank:03d}.log" for rank in range(world)]
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(world):
        prepare = before[rank] if rank < len(before) else None
        processes.append(context.Process(target=_run, args=(arguments, rank, world, port, logs[rank], prepare)))
        processes[-1].start()
    return Ranks(processes, logs)


def _run(
    arguments: list[str], rank: int, world: int, port: int, log: Path, prepare: Callable[[], object] | None
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import sys

    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not pytest's
    if world > 1:
        os.environ.update(
            TORCHELASTIC_RUN_ID="test", TORCHELASTIC_RESTART_COUNT="0", RANK=str(rank), LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0", GROUP_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False",
        )  # fmt: skip
    code = 1
    try:
        if prepare is not None:
            prepare()
        code = main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def read(folder: Path, world: int = 2) -> dict[tuple[int, int], list[str]]:
    """From `Recorder`'s files: (epoch, batch) -> the keys of all ranks. A batch that was seen again must be the same."""
    seen: dict[tuple[int, int], list[str]] = {}
    for rank in range(world):
        mine: dict[tuple[int, int], list[str]] = {}
        for line in (folder / f"rank{rank}.jsonl").read_text().splitlines():
            epoch, batch, keys = json.loads(line)
            assert mine.setdefault((epoch, batch), keys) == keys, (epoch, batch, rank)
        for place, keys in mine.items():
            seen.setdefault(place, []).extend(keys)
    return seen


class Recorder(Callback):
    """Appends the keys of every training batch to a file of this rank, on the disk before the step; and calls back.

    Args:
        folder: For the files.
    """

    moment: Callable[[str, int], object] = staticmethod(lambda name, step: None)
    """Called with a moment's name and the step: faults of a test come from here."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        Recorder.moment("made", 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, i: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.current_epoch, i, batch.keys]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        Recorder.moment("start", trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        Recorder.moment("gradients", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        Recorder.moment("end", trainer.global_step)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            Recorder.moment("validation", trainer.global_step)

    def on_sanity_check_start(self, trainer: pl.Trainer, *args: Any) -> None:
        Recorder.moment("sanity", trainer.global_step)


def calling(name: str, step: int, function: Callable[[], object]) -> Callable[[], None]:
    """To be prepared in a process: it calls a function at a moment of a step."""

    def prepare() -> None:
        def moment(now: str, reached: int) -> None:
            if (now, reached) == (name, step):
                function()

        Recorder.moment = staticmethod(moment)

    return prepare


def at(name: str, step: int, number: int = signal.SIGKILL, times: int = 1) -> Callable[[], None]:
    """To be prepared in a process: it sends itself a signal at a moment of a step, or inside the writing of a checkpoint."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    if name in ("writing", "written"):
        return lambda: _while_writing(name, step, send)
    return calling(name, step, send)


def _while_writing(name: str, step: int, send: Callable[[], None]) -> None:
    """Half the bytes of the first checkpoint from this step on, or all but the new name."""
    import io

    import torch

    from mmrep.modules.fault_tolerance import checkpoint_io

    sent: list[int] = []

    def save(content: Any, file: Any) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        whole = buffer.getvalue()
        first = len(whole) if name == "written" else len(whole) // 2
        file.write(whole[:first])
        file.flush()
        if content["global_step"] >= step and not sent:
            sent.append(step)
            send()
        file.write(whole[first:])

    class Saving:
        pass

    Saving.save = staticmethod(save)  # type: ignore[attr-defined]
    checkpoint_io.torch = Saving  # type: ignore[attr-defined]
