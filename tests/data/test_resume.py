"""Stop anywhere, go on anywhere: the samples are those of the run that was never stopped; on one machine the weights too."""

from __future__ import annotations

import multiprocessing
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from mmrep.batch import Batch
from mmrep.data.datamodule import ShardDataModule, Source
from mmrep.errors import CheckpointError
from mmrep.modules import ContrastiveModule, PairwiseCLIP
from tests.gloo_pool import GlooPool
from tests.modules.test_modules import ENCODERS, MODULES
from tests.tiny import write_tiny_shards

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*dirpath has changed.*"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


class StopError(Exception):
    """As a kill: nothing is saved on the way out."""


class Record(Callback):
    """Keeps the keys and pixels of every training batch, and stops before a given one."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.keys: list[list[str]] = []
        self.pixels: list[float] = []
        self.stop_before = stop_before

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, i: int) -> None:
        if self.stop_before == len(self.keys):
            raise StopError
        self.keys.append(batch.keys)
        image = batch.inputs["image"]
        views = image if isinstance(image, list) else [image]
        self.pixels.append(sum(float(view.double().sum()) for view in views))


def module(read_steps: bool = True) -> ContrastiveModule:
    pl.seed_everything(3, verbose=False)
    built = PairwiseCLIP(ENCODERS, embed_dim=8, lr=5e-3, warmup_steps=1)
    if not read_steps:  # without the trainer's estimate, which makes Lightning ask for the loader early
        built.configure_optimizers = lambda: torch.optim.AdamW(built.parameters(), lr=1e-3)  # type: ignore[method-assign]
    return built


def objective(name: str) -> ContrastiveModule:
    pl.seed_everything(3, verbose=False)
    module_class, encoders, options = MODULES[name]
    built: ContrastiveModule = module_class(encoders, embed_dim=8, **{"lr": 5e-3, "warmup_steps": 1, **options})
    return built


def fit(
    shards: Path,
    folder: Path,
    *,
    checkpoint: Path | None = None,
    stop_before: int | None = None,
    workers: int = 0,
    devices: int = 1,
    read_steps: bool = True,
    data: dict[str, Any] | None = None,
    built: ContrastiveModule | None = None,
    **options: Any,
) -> tuple[Record, ContrastiveModule, pl.Trainer]:
    """Train, with a checkpoint after every step; gives what was seen."""
    record, built = Record(stop_before), built or module(read_steps)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = pl.Trainer(
        **{"max_epochs": 3, "limit_val_batches": 0, **options},
        accelerator="cpu",
        devices=devices,
        logger=False,
        callbacks=[record, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    source = ShardDataModule(**{"path": str(shards), "global_batch_size": 12, "num_workers": workers, **(data or {})})
    try:
        run.fit(built, source, ckpt_path=checkpoint)
    except StopError:
        source.teardown("fit")
    return record, built, run


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """63 training samples in uneven shards, one of them empty: five batches of twelve, and a remainder."""
    folder = tmp_path_factory.mktemp("resume")
    return write_tiny_shards(folder, {"train": (20, 3, 0, 31, 9), "val": (12,), "test": (8,)})


STEPS = 15


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, ContrastiveModule, Path]:
    """The run that was never stopped, with a checkpoint after each of its steps."""
    folder = tmp_path_factory.mktemp("whole")
    record, built, _ = fit(shards, folder)
    assert len(record.keys) == STEPS
    return record, built, folder


@pytest.mark.parametrize("read_steps", [True, False])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_resumed_at_any_step_the_run_sees_the_rest_and_nothing_twice(
    step: int, read_steps: bool, shards: Path, whole: Any, tmp_path: Path
) -> None:
    record, built, folder = whole
    if not read_steps:
        fit(shards, tmp_path, stop_before=step, read_steps=False)
        folder = tmp_path
    resumed, again, _ = fit(shards, tmp_path / "on", checkpoint=folder / f"step={step}.ckpt", read_steps=read_steps)
    assert resumed.keys == record.keys[step:]
    assert resumed.pixels == record.pixels[step:]
    if read_steps:
        for (name, one), other in zip(built.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("name", ["symile", "symile placeholder", "swav", "modality-pairwise", "confu", "siglip"])
def test_every_objective_has_the_same_weights_after_a_resume(name: str, shards: Path, tmp_path: Path) -> None:
    """Queues, step counters, negatives, dropout: all that an objective keeps or draws."""
    once = {"max_epochs": 2}
    record, whole, _ = fit(shards, tmp_path / "whole", built=objective(name), **once)
    fit(shards, tmp_path / "part", built=objective(name), stop_before=7, **once)
    checkpoint = tmp_path / "part" / "step=7.ckpt"
    resumed, again, _ = fit(shards, tmp_path / "on", built=objective(name), checkpoint=checkpoint, **once)
    assert resumed.keys == record.keys[7:] and resumed.pixels == record.pixels[7:]
    for (key, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_twice_in_one_epoch_with_validation_inside(shards: Path, tmp_path: Path) -> None:
    inside = {"limit_val_batches": 1.0, "val_check_interval": 2}
    record, built, _ = fit(shards, tmp_path / "whole", **inside)
    fit(shards, tmp_path / "a", stop_before=6, **inside)
    first, _, _ = fit(shards, tmp_path / "b", checkpoint=tmp_path / "a" / "step=6.ckpt", stop_before=2, **inside)
    second, again, _ = fit(shards, tmp_path / "c", checkpoint=tmp_path / "b" / "step=8.ckpt", **inside)
    assert first.keys + second.keys == record.keys[6:]
    assert all(torch.equal(one, other) for one, other in zip(built.parameters(), again.parameters(), strict=True))


def test_with_accumulation_and_fewer_batches_than_the_epoch_has(shards: Path, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 4}
    record, built, _ = fit(shards, tmp_path / "whole", **options)
    assert len(record.keys) == 12
    for step in (1, 2, 3, 5):  # of the optimiser: two batches each
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        resumed, again, _ = fit(shards, tmp_path / str(step), checkpoint=checkpoint, **options)
        assert resumed.keys == record.keys[2 * step :]
        assert all(torch.equal(one, other) for one, other in zip(built.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("workers", [1, 3])
def test_on_other_numbers_of_workers(workers: int, shards: Path, whole: Any, tmp_path: Path) -> None:
    record, _, folder = whole
    resumed, _, _ = fit(shards, tmp_path, checkpoint=folder / "step=7.ckpt", workers=workers)
    assert resumed.keys == record.keys[7:] and resumed.pixels == record.pixels[7:]


TOPOLOGIES = [(1, 0), (1, 3), (2, 2), (4, 1)]
"""Ranks and loader workers of each."""


def on_a_rank(rank: int, world: int, workers: int, options: dict[str, Any]) -> tuple[list[list[str]], list[float]]:
    """One rank of a run whose process group is there already; the keys and pixels that it saw."""
    # The pool's processes are daemons, which may have no loader workers as children otherwise.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    if world > 1:
        options = {**options, "devices": world, "strategy": InPool(cluster_environment=Rank(rank, world))}
    record, _, _ = fit(workers=workers, **options)
    return record.keys, record.pixels


class Rank(LightningEnvironment):
    """A rank of a pool of processes."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self._rank, self._world = rank, world

    creates_processes_externally = True

    def world_size(self) -> int:
        return self._world

    def global_rank(self) -> int:
        return self._rank

    def local_rank(self) -> int:
        return self._rank

    def teardown(self) -> None:
        """The group stays."""


class InPool(DDPStrategy):
    """DDP in a process group that exists."""

    def setup_environment(self) -> None:
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()


def test_killed_twenty_times_and_resumed_on_other_ranks_and_workers(
    shards: Path, tmp_path: Path, pool2: GlooPool, pool4: GlooPool
) -> None:
    epochs = {"max_epochs": 9, "limit_train_batches": 1.0}
    whole, _, _ = fit(shards, tmp_path / "whole", **epochs)
    assert len(whole.keys) == 45
    rng = random.Random(0)
    kills = [*sorted(rng.sample(range(1, 45), 20)), 45]
    seen: list[list[str]] = []
    pixels: list[float] = []
    checkpoint = None
    for number, kill in enumerate(kills):
        world, workers = TOPOLOGIES[(number + number // 4) % 4]
        options = {
            "shards": shards,
            "folder": tmp_path / "killed",
            "checkpoint": checkpoint,
            "stop_before": kill - len(seen),
            **epochs,
        }
        pool = {2: pool2, 4: pool4}.get(world)
        if pool is None:
            shares = [on_a_rank(0, 1, workers, options)]
        else:
            shares = pool.run(on_a_rank, [(rank, world, workers, options) for rank in range(world)], timeout=90)
        for parts in zip(*(keys for keys, _ in shares), strict=True):
            seen.append([key for part in parts for key in part])
        pixels += [sum(parts) for parts in zip(*(found for _, found in shares), strict=True)]
        assert len(seen) == kill, (number, world, workers)
        checkpoint = tmp_path / "killed" / f"step={kill}.ckpt"
    assert seen == whole.keys
    assert pixels == whole.pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "data.seed was 0, is 1"),
        ({"global_batch_size": 6}, "data.global_batch_size was 12, is 6"),
        ({"window": 3}, "data.window was 64, is 3"),
        ({"batching": "stratified"}, "data.batching was mixed, is stratified"),
        ({"train_split": "val"}, "data.train_split was train, is val"),
    ],
)
def test_another_order_is_refused(
    change: dict[str, Any], message: str, shards: Path, whole: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fit(shards, tmp_path, checkpoint=whole[2] / "step=7.ckpt", data=change)


def test_other_shards_are_refused_and_copies_elsewhere_are_not(shards: Path, whole: Any, tmp_path: Path) -> None:
    record, _, folder = whole
    copy = shutil.copytree(shards, tmp_path / "copy")
    resumed, _, _ = fit(copy, tmp_path / "on", checkpoint=folder / "step=12.ckpt")
    assert resumed.keys == record.keys[12:]
    other = write_tiny_shards(tmp_path / "other", {"train": (20, 3, 0, 31, 10), "val": (12,), "test": (8,)})
    with pytest.raises(CheckpointError, match=r"data\.path was shards [0-9a-f]{12} with weight 1, is shards"):
        fit(other, tmp_path / "no", checkpoint=folder / "step=12.ckpt")


def test_a_second_fit_of_the_same_objects_begins_at_the_beginning(shards: Path, whole: Any, tmp_path: Path) -> None:
    """A place that was resumed from belongs to one fit only."""
    source = ShardDataModule(str(shards), global_batch_size=12, num_workers=0)
    seen = []
    for checkpoint in (whole[2] / "step=7.ckpt", None):
        record = Record()
        run = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
            callbacks=[record], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        run.fit(module(), source, ckpt_path=checkpoint)
        seen.append(record.keys)
    assert seen[0] == whole[0].keys[7:10] and seen[1] == whole[0].keys[:10]


def test_evaluation_of_a_checkpoint_takes_any_data(shards: Path, whole: Any, tmp_path: Path) -> None:
    other = write_tiny_shards(tmp_path / "other", {"train": (20,), "val": (12,), "test": (9,)})
    run = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    source = ShardDataModule(str(other), global_batch_size=4, num_workers=0)
    (figures,) = run.test(module(), source, ckpt_path=whole[2] / "step=7.ckpt", verbose=False)
    assert "test/text->image/recall@1" in figures


def test_a_blend_goes_on_where_it_stood(shards: Path, tmp_path: Path) -> None:
    other = write_tiny_shards(tmp_path / "other", {"train": (17, 8), "val": (12,)})
    blend = {"path": [Source(str(shards), 2.0), Source(str(other), 1.0)], "batching": "stratified"}
    record, _, _ = fit(shards, tmp_path / "whole", data=blend)
    assert len(record.keys) == 3 * (88 // 12)
    resumed, _, _ = fit(shards, tmp_path / "on", data=blend, checkpoint=tmp_path / "whole" / "step=10.ckpt")
    assert resumed.keys == record.keys[10:] and resumed.pixels == record.pixels[10:]
    changed = {"path": [Source(str(shards), 1.0), Source(str(other), 1.0)], "batching": "stratified"}
    with pytest.raises(CheckpointError, match=r"data\.path was"):
        fit(shards, tmp_path / "no", data=changed, checkpoint=tmp_path / "whole" / "step=10.ckpt")


@pytest.mark.parametrize("batching", ["stratified", "homogeneous"])
def test_planned_modality_sets_train_on_one_rank_and_two(
    batching: str, shards: Path, tmp_path: Path, pool2: GlooPool
) -> None:
    """A homogeneous batch may lack a modality on every rank, or hold one alone: no pair, no loss, the same collectives."""
    options = {
        "shards": shards,
        "data": {"batching": batching, "global_batch_size": 4},
        "max_epochs": 2,
        "accumulate_grad_batches": 1,
    }
    alone, _ = on_a_rank(0, 1, 0, {**options, "folder": tmp_path / "alone"})
    shares = pool2.run(
        on_a_rank, [(rank, 2, 0, {**options, "folder": tmp_path / "two"}) for rank in range(2)], timeout=90
    )
    together = [one + other for one, other in zip(*(keys for keys, _ in shares), strict=True)]
    assert together == alone
    first = [key for batch in alone[: len(alone) // 2] for key in batch]
    assert len(first) == len(set(first)) >= 48
    resumed, _, _ = fit(
        shards, tmp_path / "on", data=options["data"], max_epochs=2, checkpoint=tmp_path / "two" / "step=9.ckpt"
    )
    assert resumed.keys == alone[9:]
