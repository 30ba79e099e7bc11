"""``runs/NAME``: what one training run leaves, and when it may be written."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmrep.cli.launch import is_first, launched
from mmrep.cli.resume import is_ours
from mmrep.errors import ConfigError
from mmrep.files import PART, set_aside

RESULTS = ("metrics.csv", "checkpoints", "model")
REPLACED = f".replaced{PART}"
"""End of the name of what a new run replaces, until its first step."""


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
        self._replaced: dict[Path, Path] = {}  # where it is for now -> where it was

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def check(self, checkpoints: Path, *, overwrite: bool, resume: str | None, checkpoint: str | None = None) -> None:
        """Refuse to train into a folder that holds something, unless the user said what to do with it.

        An earlier run that a start set aside, which was killed before its first step, has its place back first.

        Args:
            checkpoints: Where the run writes its checkpoints, in this folder or elsewhere.
            overwrite: Whether an earlier run may be replaced.
            resume: ``auto`` to go on from its last checkpoint.
            checkpoint: What the new run starts from, if the user named it.

        Raises:
            ConfigError: If it holds results of a run, is no run folder at all, or what the run starts from would be removed.
        """
        if resume not in (None, "auto"):
            raise ConfigError(f"--resume {resume}", fix="use --resume auto, or --ckpt_path FILE")
        above = Path(checkpoint).resolve().parents if checkpoint is not None else []
        inside = self.path.resolve() in above or checkpoints.resolve() in above[:1]
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
        if not is_first():
            return
        self._recover(checkpoints)
        results = any((self.path / name).exists() for name in RESULTS)
        ours = results or (self.path / "config.yaml").exists()
        if not ours and self.path.exists() and any(self.path.iterdir()):
            raise ConfigError(
                "the folder exists and holds no run of mmrep", where=self.path, fix="choose another --name"
            )
        if overwrite or resume:
            return
        if results:
            raise ConfigError(
                "the run folder exists", where=self.path, fix="add --overwrite, --resume auto, or another --name"
            )
        if _ours(checkpoints):
            raise ConfigError(
                "the folder holds checkpoints of another run",
                where=checkpoints,
                fix="add --overwrite, --resume auto, or another --checkpoint.dirpath",
            )

    def make_way(self, checkpoints: Path, *, overwrite: bool) -> None:
        """Set an earlier run that is to be replaced aside, or its metrics.csv, which Lightning starts anew.

        No checkpoint of a run that goes on is removed, only what was left of one that was never finished. Call this last,
        when the new run has been found able to start; then `forget` at its first step, or `put_back` where it makes none.

        Args:
            checkpoints: Where the run writes its checkpoints.
            overwrite: Whether an earlier run is replaced. Elsewhere than in this folder it is mmrep's checkpoints alone.
        """
        if not is_first():
            return
        for unfinished in checkpoints.glob(f"*.ckpt.*{PART}"):  # of a process that was killed while it wrote
            if not unfinished.name.endswith(REPLACED):
                unfinished.unlink(missing_ok=True)
        if overwrite and self.path.exists():
            self._replace(self._real)
            self._real.mkdir()  # a link must not point to nothing
        if overwrite:
            for file in _ours(checkpoints):
                self._replace(file)
        set_aside(self.path / "metrics.csv")

    @property
    def _real(self) -> Path:
        """The folder itself where its name is a link, to a larger disk say, which stays."""
        return self.path.resolve() if self.path.is_symlink() else self.path

    def _replace(self, path: Path) -> None:
        aside = _aside(path)
        path.rename(aside)
        self._replaced[aside] = path

    def _recover(self, checkpoints: Path) -> None:
        """What lies aside is the earlier run, since the first step removes it; in its place is what a killed start left.

        Raises:
            ConfigError: If it cannot be put back.
        """
        aside = sorted(checkpoints.glob(f"*.ckpt{REPLACED}"))
        replaced = [self._real, *(file.with_name(file.name.removesuffix(REPLACED)) for file in aside)]
        self._replaced = {_aside(path): path for path in replaced}
        self.put_back("the last start made no step")
        for path in replaced:
            if os.path.lexists(_aside(path)):
                raise ConfigError("the earlier run is not in its place", where=path, fix=f"move {_aside(path)} there")

    def forget(self) -> None:
        """Remove what was set aside to be replaced.

        Raises:
            ConfigError: If another start has given it its place back: two runs would write there.
        """
        for aside, path in self._replaced.items():
            if not os.path.lexists(aside):
                raise ConfigError(
                    "another start put back what this run replaces", where=path, fix="start one at a time"
                )
            _remove(aside)
        self._replaced = {}

    def put_back(self, why: str = "no step was made") -> bool:
        """Give what was set aside its place again, unless a process of this run has removed it.

        Args:
            why: For the line that says so.

        Returns:
            Whether there was something.
        """
        back: list[Path] = []
        for aside, path in self._replaced.items():
            if not os.path.lexists(aside):
                continue
            try:
                _remove(path)
                aside.rename(path)
                back.append(path)
            except OSError as error:
                print(f"mmrep: warning: what it replaces stays aside ({error.strerror}) [{aside}]", file=sys.stderr)
        self._replaced = {}
        if back:
            print(f"{why}: the earlier run stays in {back[0]}")
        return bool(back)


class FirstStep(Callback):
    """Removes the run that this one replaces, once a step has been made. Until then a start that fails gives it back.

    Args:
        folder: Of the run.

    Attributes:
        made: Whether there was a step in this process.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.made = folder, False

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.made or trainer.fit_loop._should_accumulate():
            return
        if trainer.is_global_zero:
            self.folder.forget()
        self.made = True


def _ours(checkpoints: Path) -> list[Path]:
    """The checkpoints of mmrep in a folder that may hold models of others."""
    return [file for file in sorted(checkpoints.glob("*.ckpt")) if is_ours(file)]


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}{REPLACED}")


def _remove(path: Path) -> None:
    """At once: a folder that is gone in part must not pass for the earlier run."""
    if path.is_dir() and not path.is_symlink():
        gone = path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PART}"))
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
