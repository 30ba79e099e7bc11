"""`--tensorboard` on a full disk: one warning, no traceback, and the curves go on when there is room."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import pytorch_lightning as pl

from mmrep.cli import main
from mmrep.modules.monitoring import tensorboard_logger
from mmrep.modules.monitoring.tensorboard_logger import DiskSafeTensorBoardLogger
from tests.modules.fault_tolerance.running import STEPS, fill, small_disk, write_config

FULL, ROOM = 2, 12
"""Steps before which a disk fills and has room again."""


class Filling(pl.Callback):
    """Fills a disk for some steps.

    Args:
        disk: Where.
        room: Whether there is room again.
    """

    def __init__(self, disk: str, room: bool = True) -> None:
        self.disk, self.room = Path(disk), room

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == FULL:
            fill(self.disk)
        if trainer.global_step == ROOM and self.room:
            (self.disk / "filler").unlink()


def steps(folder: Path, name: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    return [event.step for event in events.Reload().Scalars(name)]


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("pause", [0.0, 60.0])
def test_a_full_disk_ends_no_training(
    pause: float, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard_logger, "PAUSE", pause)
    disk = tmp_path / "disk"
    filling = {"class_path": f"{__name__}.Filling", "init_args": {"disk": str(disk)}}
    config = write_config(
        tmp_path, tiny_shards, trainer__log_every_n_steps=1, trainer__callbacks=[filling], runs=str(disk)
    )
    small_disk(disk)
    try:
        assert main(["fit", "--config", str(config), "--tensorboard"]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
        assert len(said) == 1 and "cannot be written (No space left on device)" in said[0]
        folder = disk / "run" / "tensorboard"
        shown = steps(folder, "train/loss")
        assert len(shown) == len(set(shown))
        assert {0, 1} <= set(shown) and not {ROOM - 3, ROOM - 2} & set(shown), (
            "a few more fit into a page that was begun"
        )
        assert set(range(ROOM, STEPS)) <= set(shown) if pause == 0 else max(shown) < ROOM
        files = list(folder.glob("events.*"))
        assert len(files) == (2 if pause == 0 else 1) and all(path.stat().st_size for path in files)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_made_is_warned_of_and_other_errors_are_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in a folder's place")
    logger = DiskSafeTensorBoardLogger(tmp_path / "file", name="tensorboard", version="")
    logger.log_hyperparams({"lr": 0.1})
    logger.log_text("config", "text", 0)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    logger.finalize("success")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmrep: warning: TensorBoard's events cannot be written (")
    with pytest.raises(ValueError, match="not supported"):
        DiskSafeTensorBoardLogger(tmp_path, name="tensorboard", version="").log_metrics({"loss": object()}, 0)  # type: ignore[dict-item]
