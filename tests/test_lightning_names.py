"""The private names of Lightning that mmrep uses exist: an upgrade that renames one fails here, and not in a run of weeks."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
from lightning_fabric.utilities.cloud_io import _is_local_file_protocol
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

import mmrep

OF_A_TRAINER = [
    "_accelerator_connector.use_distributed_sampler",
    "_logger_connector.on_batch_end",
    "_logger_connector.update_train_step_metrics",
    "_signal_connector",
    "fit_loop._data_fetcher",
    "fit_loop._should_accumulate",
    "fit_loop.epoch_loop._broadcast_sigterm_tensor",
    "fit_loop.epoch_loop._should_check_val_fx",
    "fit_loop.epoch_loop.batch_progress.current.processed",
    "fit_loop.epoch_loop.max_steps",
    "fit_loop.epoch_loop.val_loop.batch_progress.is_last_batch",
    "strategy._launcher",
]
OF_OTHERS: list[tuple[object, str]] = [
    (Callback(), "_generate_state_key"),
    *((ModelCheckpoint(), name) for name in ("_every_n_epochs", "_every_n_train_steps", "_format_checkpoint_name")),
    *((ModelCheckpoint(), name) for name in ("_last_global_step_saved", "_monitor_candidates", "_train_time_interval")),
    *((ModelCheckpoint(), name) for name in ("_save_last_checkpoint", "_save_topk_checkpoint")),
    (EarlyStopping("val/loss"), "_run_early_stopping_check"),
    *((WeightAveraging(), name) for name in ("_average_model", "_device", "_latest_update_step")),
    *((LightningCLI, name) for name in ("_get", "_instantiate_trainer", "_run_subcommand")),
    *((_SubprocessScriptLauncher, name) for name in ("_call_children_scripts", "kill")),
    (_SignalConnector, "register_signal_handlers"),
    (DDPStrategy(), "_timeout"),
    (TensorBoardLogger("."), "_experiment"),
    (WandbLogger(offline=True), "_experiment"),
    (WandbLogger(offline=True), "_wandb_init"),
    (pl.LightningModule(), "_trainer"),
]
OF_A_LOOP = re.compile(r"\b(?:trainer|fit_loop|loop|strategy|_connector)\.(_[a-z]\w*)")


@pytest.fixture(scope="module")
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("name", OF_A_TRAINER)
def test_a_trainer_has_it(name: str, trainer: pl.Trainer) -> None:
    operator.attrgetter(name)(trainer)


@pytest.mark.parametrize(("owner", "name"), OF_OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_its_owner_has_it(owner: object, name: str) -> None:
    assert hasattr(owner, name)


def test_the_loops_are_saved_under_the_names_that_are_mended(trainer: pl.Trainer) -> None:
    saved = trainer.fit_loop.state_dict()
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        assert {"ready", "processed", "completed"} <= saved[name]["total"].keys()
    assert saved["epoch_loop.val_loop.batch_progress"].keys() == {"total", "current", "is_last_batch"}


def test_functions_do_what_they_did() -> None:
    assert _is_local_file_protocol("a/b.ckpt") and not _is_local_file_protocol("s3://a/b.ckpt")
    assert callable(_set_num_threads_if_needed)


def test_the_list_has_all_that_is_used_of_trainers_and_loops() -> None:
    known = {part for name in OF_A_TRAINER for part in name.split(".")} | {name for _, name in OF_OTHERS}
    for path in Path(mmrep.__file__).parent.rglob("*.py"):
        unknown = set(OF_A_LOOP.findall(path.read_text(encoding="utf-8"))) - known
        assert not unknown, f"{path}: {unknown}"
