"""``runs/NAME``: what one training run leaves, and when it may be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mmrep.cli.launch import is_first, launched
from mmrep.errors import ConfigError
from mmrep.files import PART, set_aside

RESULTS = ("metrics.csv", "checkpoints", "model")


class RunFolder:
    """The folder of one run: config.yaml (resolved), checkpoints/, metrics.csv, model/.

    Args:
        runs: Folder of all runs.
        name: Of this run: one folder name.
    """

    def __init__(self, runs: Path, name: str) -> None:
        if not name or Path(name).name != name or name.startswith("."):
            raise ConfigError(f"'{name}' cannot name a run", where="--name", fix="use one plain folder name")
        self.path = runs / name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check(self, *, overwrite: bool, resume: str | None, checkpoint: str | None = None) -> None:
        """Refuse to train into a folder that holds something, unless the user said what to do with it.

        Args:
            overwrite: Whether an earlier run may be replaced.
            resume: ``auto`` to go on from its last checkpoint.
            checkpoint: What the new run starts from, if the user named it.

        Raises:
            ConfigError: If it holds results of a run, is no run folder at all, or what the run starts from would be removed.
        """
        if resume not in (None, "auto"):
            raise ConfigError(f"--resume {resume}", fix="use --resume auto, or --ckpt_path FILE")
        inside = checkpoint is not None and self.path.resolve() in Path(checkpoint).resolve().parents
        if overwrite and (resume or inside):
            raise ConfigError(
                "--overwrite would remove the checkpoint to go on from", where=self.path, fix="leave it out"
            )
        launch = launched()
        if overwrite and launch is not None and launch.repeated:
            raise ConfigError(
                f"{launch.by} starts this command more than once, and --overwrite would remove what it had done",
                where=self.path,
                fix="give --resume auto instead, from the first start on",
            )
        if not is_first() or not self.path.exists() or not any(self.path.iterdir()):
            return
        ours = any((self.path / name).exists() for name in (*RESULTS, "config.yaml"))
        if not ours:
            raise ConfigError(
                "the folder exists and holds no run of mmrep", where=self.path, fix="choose another --name"
            )
        if any((self.path / name).exists() for name in RESULTS) and not (overwrite or resume):
            raise ConfigError(
                "the run folder exists", where=self.path, fix="add --overwrite, --resume auto, or another --name"
            )

    def make_way(self, checkpoints: Path, *, overwrite: bool) -> None:
        """Remove an earlier run that is to be replaced, or set its metrics.csv aside, which Lightning starts anew.

        No checkpoint of a run that goes on is removed, only what was left of one that was never finished. Call this last,
        when the new run has been found able to start.

        Args:
            checkpoints: Where the run writes its checkpoints.
            overwrite: Whether an earlier run is removed.
        """
        if not is_first():
            return
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        for unfinished in checkpoints.glob(f"*.ckpt.*{PART}"):  # of a process that was killed while it wrote
            unfinished.unlink(missing_ok=True)
        set_aside(self.path / "metrics.csv")


def check_writable(folder: Path) -> None:
    """Find out before the training that no checkpoint could be written, and not after its first hour.

    Raises:
        ConfigError: If something else stands in the place of the folder, or of one above it, or nothing may be written there.
    """
    place = folder.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if is_first() and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise ConfigError(
            "checkpoints cannot be written", where=place, fix="give a folder that is writable: --runs DIR"
        )
