"""The side of `benchmarks.step` that is mmrep's: what ``mmrep fit`` builds, with batches that are in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mmrep.cli.train import TrainCLI
from mmrep.data.build import build_index
from mmrep.data.index import Modality
from mmrep.data.writer import write_shard


@dataclass
class Loader:
    """Batches that are in memory already, as a loader of known length."""

    batches: Callable[[], Iterator[Any]]
    count: int
    batch_size: int
    num_batches: int = field(init=False)
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_batches, self.num_samples = self.count, self.count * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def __len__(self) -> int:
        return self.count


class Fit(TrainCLI):
    """``mmrep fit``: its trainer with all callbacks and loggers, its module and data module; `train` is when it runs.

    Its terminal is none: it shows what it shows in a job's log.

    Args:
        folder: For config, shards and run.
        architecture: ``model_cfg`` of open_clip.
        batch_size: Of its batches.
        **module: Arguments of `PairwiseCLIP` beside the encoders.
    """

    def __init__(self, folder: Path, architecture: dict[str, Any], batch_size: int, **module: Any) -> None:
        self.batch_size = batch_size
        config = folder / "step.yaml"
        config.write_text(yaml.safe_dump(_config(folder, architecture, batch_size, module)))
        with _job_log():
            super().__init__(["fit", "--config", str(config)])

    def _run_subcommand(self, subcommand: str) -> None:
        """Not yet."""

    def train(self, batches: Iterator[Any], count: int) -> None:
        """Steps on so many batches, an epoch; nothing is validated."""
        self.datamodule.train_dataloader = lambda: Loader(lambda: batches, count, self.batch_size)
        with _job_log():
            self.trainer.fit(self.model, datamodule=self.datamodule)
        self.watchdog.close()


@contextmanager
def _job_log() -> Iterator[None]:
    """Neither stdout nor stderr is a terminal."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _config(folder: Path, architecture: dict[str, Any], batch_size: int, module: dict[str, Any]) -> dict[str, Any]:
    """Of the command line; what it does not say is the default."""
    tower = {"architecture": architecture, "projection": False}
    encoders = {
        "image": {"class_path": "mmrep.encoders.OpenClipImageEncoder", "init_args": tower},
        "text": {"class_path": "mmrep.encoders.OpenClipTextEncoder", "init_args": tower},
    }
    return {
        "model": {"class_path": "mmrep.modules.PairwiseCLIP", "init_args": {"encoders": encoders, **module}},
        "data": {"path": str(_write_shards(folder / "shards", batch_size)), "global_batch_size": batch_size},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0},
        "runs": str(folder / "runs"),
    }


def _write_shards(folder: Path, samples: int) -> Path:
    """What the data module is checked with; it is not trained on."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    for split in ("train", "val"):
        members = [{"__key__": f"{split}{i:05d}", "png": picture.getvalue(), "txt": b"a"} for i in range(samples)]
        write_shard(folder / f"{split}-000000.tar", members)
    build_index(folder, {"image": Modality(("png",), "image"), "text": Modality(("txt",), "text")}).save()
    return folder
