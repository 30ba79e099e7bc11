"""Timing a real training: not a number changes, the shares add up, every kind of step is timed, the ranks tell each other."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint, ProgressBar
from pytorch_lightning.profilers import SimpleProfiler

import mmrep.modules.monitoring.throughput
from mmrep.batch import Batch
from mmrep.data.datamodule import ShardDataModule
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.reader import Samples
from mmrep.encoders import ConvImageEncoder, NgramTextEncoder
from mmrep.modules import PairwiseCLIP
from mmrep.modules.monitoring.clock_profiler import ClockProfiler
from mmrep.modules.monitoring.pace import Pace
from mmrep.modules.monitoring.throughput import Throughput
from mmrep.ops.step_clock import (
    CHECKPOINT,
    COMMUNICATION,
    DATA,
    ENCODERS_BACKWARD,
    ENCODERS_FORWARD,
    LOSS_BACKWARD,
    LOSS_FORWARD,
    OPTIMISER,
    PARTS,
    REST,
    VALIDATION,
    StepClock,
    mark_backward,
    running,
    timed,
)
from tests.gloo_pool import GlooPool
from tests.ops.test_step_clock import Hand

ENCODERS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
}


def fit(shards: Path, callbacks: list[pl.Callback], *, ckpt_path: str | None = None, **options: Any) -> PairwiseCLIP:
    torch.manual_seed(0)
    module = PairwiseCLIP(ENCODERS, embed_dim=8, micro_batch_size=options.pop("micro_batch_size", None), warmup_steps=1)
    options = {"max_epochs": 2, "log_every_n_steps": 1, **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        enable_model_summary=False,
        callbacks=callbacks,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module, ShardDataModule(str(shards), global_batch_size=16, num_workers=0), ckpt_path=ckpt_path)
    module.logged = {name: float(value) for name, value in trainer.logged_metrics.items()}  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"micro_batch_size": 5}])
def test_training_is_bit_equal_with_and_without_and_every_part_is_timed(
    options: dict[str, Any], tiny_shards: Path, tmp_path: Path
) -> None:
    timing = Throughput(tmp_path / "throughput.json", warmup_steps=1)
    with_, without = fit(tiny_shards, [timing], **options), fit(tiny_shards, [], **options)
    other = without.state_dict()
    assert all(bool((value == other[name]).all()) for name, value in with_.state_dict().items())
    report = json.loads((tmp_path / "throughput.json").read_text())
    assert report == timing.report and sum(report["shares"].values()) == pytest.approx(1)
    steps = 4 if options.get("accumulate_grad_batches") else 6
    first = 2 if options.get("accumulate_grad_batches") else 1  # batches of the first step
    assert report["steps"] == steps - 1 and report["warmup_steps"] == 1 and report["samples"] == (6 - first) * 16
    used = {DATA, ENCODERS_FORWARD, ENCODERS_BACKWARD, LOSS_FORWARD, LOSS_BACKWARD, OPTIMISER, VALIDATION, REST}
    assert {part for part, share in report["shares"].items() if share > 0} == used
    assert report["shares"][COMMUNICATION] == 0 and report["peak_memory_bytes"]["host"][0] > 50 << 20
    training = report["wall_seconds"] - report["seconds"][VALIDATION][0]
    assert report["samples_per_second"] == pytest.approx(report["samples"] / training)


class Slow(pl.Callback):
    """Makes parts take a time that is known."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data, model = trainer.datamodule, pl_module.model  # type: ignore[attr-defined]
        pl_module._loss = _after(0.02, pl_module._loss)  # type: ignore[assignment]
        pl_module.forward = _after(0.03, pl_module.forward)  # type: ignore[method-assign]
        data._loader = _slow_loader(data._loader)
        assert model is not None

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        time.sleep(0.2)


def _after(seconds: float, function: Any) -> Any:
    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **options)

    return slow


def _slow_loader(make: Any) -> Any:
    def loader(split: str, *, train: bool) -> Any:
        made = make(split, train=train)
        collate = made.collate_fn
        made.collate_fn = _after(0.05 if train else 0.0, collate)
        return made

    return loader


def test_time_is_found_where_it_was_spent(tiny_shards: Path) -> None:
    timing = Throughput(warmup_steps=0)
    fit(tiny_shards, [timing, Slow()], num_sanity_val_steps=0)
    assert timing.report is not None
    seconds = {part: values[0] for part, values in timing.report["seconds"].items()}
    # Six steps; Lightning fetches the first batch before the clock runs. Two validations of two batches.
    assert 5 * 0.05 <= seconds[DATA] < 6 * 0.05 + 0.6
    assert 6 * 0.03 <= seconds[ENCODERS_FORWARD] < 6 * 0.03 + 0.6
    assert 6 * 0.02 <= seconds[LOSS_FORWARD] < 6 * 0.02 + 0.6
    assert seconds[VALIDATION] >= 2 * 0.2


def test_rates_and_learning_rate_are_logged_and_the_first_steps_are_in_a_report_of_nothing_else(
    tiny_shards: Path,
) -> None:
    timing = Throughput(warmup_steps=6)
    logged: dict[str, float] = fit(tiny_shards, [timing]).logged  # type: ignore[assignment]
    assert timing.report is not None
    assert timing.report["steps"] == 6 and timing.report["samples"] == 96 and timing.report["warmup_steps"] == 0
    assert logged["train/samples_per_second"] > 0 and 0 < logged["train/data_wait_share"] < 1
    assert 0 < logged["train/learning_rate"] <= 1e-3 and logged["train/gradient_norm"] > 0


def test_a_run_that_goes_on_counts_its_own_steps_and_a_finished_one_has_no_report(
    tiny_shards: Path, tmp_path: Path
) -> None:
    fit(tiny_shards, [ModelCheckpoint(tmp_path, save_last=True)], max_epochs=1)
    timing = Throughput(warmup_steps=1)
    fit(tiny_shards, [timing], max_epochs=3, ckpt_path=str(tmp_path / "last.ckpt"))
    assert timing.report is not None and timing.report["steps"] == 5 and timing.report["samples"] == 80
    again = Throughput()
    fit(tiny_shards, [again], max_epochs=1, ckpt_path=str(tmp_path / "last.ckpt"))
    assert again.report is None and again.pace is None


def test_the_profiler_of_the_user_hears_everything_and_is_given_back(tiny_shards: Path) -> None:
    profiler = SimpleProfiler()
    seen: list[Any] = []

    class Look(pl.Callback):
        def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            seen.append(trainer.profiler)

    fit(tiny_shards, [Throughput(), Look()], profiler=profiler)
    heard = profiler.recorded_durations
    assert len(heard["[_TrainingEpochLoop].train_dataloader_next"]) >= 5 and len(heard["run_training_batch"]) == 6
    assert seen == [profiler]


def test_an_error_stops_the_clock(tiny_shards: Path) -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("on purpose")

    timing = Throughput()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tiny_shards, [timing, Fails()])
    assert timing.pace is None and timing.report is None


class Costed(Throughput):
    """Times what the measuring does itself: its hooks, and every mark of the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[float] = []
        self.cost = 0.0

    def timed(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            start, before = time.thread_time(), self.cost
            try:
                return function(*args, **options)
            finally:
                self.cost = before + time.thread_time() - start  # what it calls is in it

        return call

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        assert self.pace is not None
        for name in ("enter", "leave", "switch"):
            setattr(self.pace.clock, name, self.timed(getattr(self.pace.clock, name)))
        for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
            setattr(self, name, self.timed(getattr(super(), name)))
        self.on_train_batch_end = self.counted(self.on_train_batch_end)  # type: ignore[method-assign]

    def counted(self, last: Any) -> Any:
        def call(*args: Any, **options: Any) -> None:
            last(*args, **options)
            self.costs.append(self.cost)
            self.cost = 0.0

        return call


def test_measuring_costs_less_than_a_hundredth_of_a_step_of_twenty_milliseconds(tiny_shards: Path) -> None:
    """In a real training: the median of plain steps, and that of log steps, of which Lightning's ``log`` is the most."""
    timing = Costed()
    fit(tiny_shards, [timing], max_epochs=40, check_val_every_n_epoch=40, log_every_n_steps=5)
    assert len(timing.costs) == 120
    plain = statistics.median(cost for step, cost in enumerate(timing.costs, 1) if step % 5)
    logging = statistics.median(timing.costs[4::5])
    shares = f"{plain / 0.02:.2%} and {logging / 0.02:.1%} of a step of 20 ms"
    print(f"\nmeasuring takes {1e6 * plain:.0f} us in a step, {1e6 * logging:.0f} us in a log step: {shares}")
    assert plain < 0.01 * 0.02 and 0 < logging < 0.1 * 0.02


class OwnProfiler(SimpleProfiler):
    """Overrides what is around an action, and has something of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.around: list[str] = []
        self.ended = 0

    @contextmanager
    def profile(self, action_name: str) -> Iterator[str]:
        self.around.append(action_name)
        yield action_name

    def teardown(self, stage: str | None) -> None:
        self.ended += 1


def test_the_clock_s_profiler_is_the_user_s_in_all_but_the_marks() -> None:
    own, hand = OwnProfiler(), Hand()
    clock = StepClock(hand)
    profiler = ClockProfiler(clock, own)
    with profiler.profile("optimizer_step") as given:
        hand.time += 1.0
        with profiler.profile("[Callback]Any.on_train_batch_end"):
            hand.time += 2.0
    assert given == "optimizer_step" and own.around == ["optimizer_step", "[Callback]Any.on_train_batch_end"]
    assert clock.seconds()[OPTIMISER] == 3.0
    assert profiler.around is own.around and profiler.start_time == own.start_time and profiler.local_rank == 0
    with pytest.raises(AttributeError, match="nowhere"):
        _ = profiler.nowhere
    del profiler
    assert own.ended == 0, "it goes on"


class SlowDisk(TorchCheckpointIO):
    """Takes a known time to write."""

    def save_checkpoint(self, *args: Any, **options: Any) -> None:
        time.sleep(0.3)
        super().save_checkpoint(*args, **options)


def test_a_checkpoint_that_a_validation_writes_is_no_validation(tiny_shards: Path, tmp_path: Path) -> None:
    timing = Throughput(warmup_steps=0)
    saving = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1)
    fit(tiny_shards, [timing, saving], val_check_interval=2, max_epochs=2, plugins=[SlowDisk()], num_sanity_val_steps=0)
    assert timing.report is not None and len(list(tmp_path.glob("*.ckpt"))) == 2
    seconds = {part: values[0] for part, values in timing.report["seconds"].items()}
    assert seconds[CHECKPOINT] >= 2 * 0.3 and 0 < seconds[VALIDATION] < 0.3


def test_without_log_steps_nothing_is_computed_for_them(tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``log_every_n_steps: 0``: neither norms nor, a collective, how the embeddings lie."""
    asked: list[str] = []
    monkeypatch.setattr(mmrep.modules.monitoring.throughput, "get_total_norm", lambda *_: asked.append("norm"))
    monkeypatch.setattr(PairwiseCLIP, "_log_geometry", lambda self, stage, *_: asked.append(stage))
    logged: dict[str, float] = fit(  # type: ignore[assignment]
        tiny_shards, [Throughput()], log_every_n_steps=0, limit_val_batches=0
    ).logged
    assert asked == [] and logged.keys() == {f"train/{n}" for n in ("loss", "loss/image-text", "logit_scale", "faults")}


class Stepping(torch.nn.Module):
    """What a training step does inside DDP; the encoders' backward pass takes ``seconds`` longer."""

    def __init__(self, module: PairwiseCLIP, seconds: float) -> None:
        super().__init__()
        self.module, self.seconds = module, seconds

    def forward(self, batch: Batch) -> torch.Tensor:
        rows = self.module(batch)
        mark_backward(rows, several_ranks=True)
        rows["image"].register_hook(lambda _: time.sleep(self.seconds))
        return self.module._loss(batch, rows).loss


def _step_under_ddp(rank: int, shards: Path) -> dict[str, float]:
    torch.manual_seed(0)
    module = PairwiseCLIP(ENCODERS, embed_dim=8)
    data, encoders = ShardDataModule(str(shards)), module.model.by_modality
    data.setup("fit")
    assert data.index is not None
    dataset = ShardDataset(Samples(data.index, "train"), encoders, global_batch_size=16, train=True)
    parallel = torch.nn.parallel.DistributedDataParallel(Stepping(module, 0.1 * rank))
    with running(StepClock()) as clock:
        for batch in make_loader(dataset, encoders, rank=rank, world=2):
            loss = parallel(batch)
            clock.enter(LOSS_BACKWARD)
            loss.backward()
            clock.leave()
    return clock.seconds()


def test_the_faster_rank_waits_for_the_gradients_of_the_slower(pool2: GlooPool, tiny_shards: Path) -> None:
    fast, slow = pool2.run(_step_under_ddp, [(0, tiny_shards), (1, tiny_shards)])
    wait = 3 * 0.1  # three steps
    assert fast[COMMUNICATION] > 0.9 * wait > slow[COMMUNICATION] > 0
    assert slow[ENCODERS_BACKWARD] > wait > fast[ENCODERS_BACKWARD] > 0
    assert 0 < fast[LOSS_BACKWARD] < wait


def _report(rank: int, folder: Path) -> Any:
    timing, hand = Throughput(folder / "throughput.json", warmup_steps=0), Hand()
    clock = StepClock(hand)
    timing.pace, timing._samples, timing._first_step = Pace(clock), 3 + rank, 2
    timing._warm_up = (dict.fromkeys(PARTS, 0.0), 0, 0)
    with running(clock), timed(DATA):
        hand.time += rank + 1.0
    hand.time += 7.0
    timing.on_train_end(SimpleNamespace(global_step=7, is_global_zero=rank == 0), pl.LightningModule())  # type: ignore[arg-type]
    return timing.report


def test_every_rank_has_the_report_of_all_and_the_first_writes_it(pool2: GlooPool, tmp_path: Path) -> None:
    report, other = pool2.run(_report, [(0, tmp_path), (1, tmp_path)])
    assert report == other == json.loads((tmp_path / "throughput.json").read_text())
    assert report["ranks"] == 2 and report["samples"] == 7 and report["steps"] == 5
    assert report["seconds"][DATA] == [1, 2] and report["seconds"][REST] == [7, 7]
    assert report["shares"][DATA] == pytest.approx(1.5 / 8.5) and report["samples_per_second"] == pytest.approx(7 / 8.5)
    assert all(peak > 50 << 20 for peak in report["peak_memory_bytes"]["host"])
