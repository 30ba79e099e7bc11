"""Signals that ask a run to stop: a checkpoint at the next step, exit code 0, and nothing is left running."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.trainer.states import TrainerFn

from mmrep.data.worker_signals import SIGNALS
from mmrep.modules.fault_tolerance.preemption import PreemptedError, Preemption, StopSignals
from tests.launched import at, calling, launch, read
from tests.modules.fault_tolerance.running import (
    assert_same,
    assert_same_curves,
    both,
    fit,
    newest_step,
    weights,
    write_config,
)
from tests.tiny import file_bytes


@pytest.mark.parametrize(
    ("moment", "step", "number", "times", "stopped"),
    [
        ("start", 7, signal.SIGTERM, 1, 8),
        ("end", 4, signal.SIGUSR1, 1, 5),
        ("gradients", 8, signal.SIGINT, 2, 10),
        ("start", 11, signal.SIGTERM, 1, 12),  # the last step of an epoch: its validation comes when the run goes on
        ("end", 12, signal.SIGTERM, 3, 12),
        ("gradients", 11, signal.SIGTERM, 1, 12),
        ("validation", 12, signal.SIGTERM, 1, 12),
        ("writing", 6, signal.SIGTERM, 1, 7),
    ],
)
def test_a_signal_ends_the_run_with_a_checkpoint_and_exit_code_0(
    moment: str, step: int, number: int, times: int, stopped: int, alone: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1)
    begun = time.monotonic()
    ranks = fit(tmp_path, world=1, before=[at(moment, step, number, times)])
    assert ranks.codes == [0] and time.monotonic() - begun < 60, ranks.text()
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "stopped.ckpt"
    message = (
        f"mmrep: stopped after step {stopped}; checkpoint in {checkpoint}; the same command with --resume auto goes on"
    )
    assert message in ranks.text().splitlines() and "Traceback" not in ranks.text()
    assert newest_step(tmp_path) == stopped
    assert not (tmp_path / "runs" / "run" / "model").exists()  # which says that a run is complete
    ranks = fit(tmp_path, "--resume", "auto", world=1)
    assert ranks.codes == [0], ranks.text()
    assert read(tmp_path / "seen", 1) == read(alone / "seen", 1)
    assert_same_curves(tmp_path, alone)
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize("moment", ["made", "sanity"])
def test_a_signal_before_the_first_step_has_nothing_to_save(moment: str, tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards, trainer__num_sanity_val_steps=2)
    ranks = fit(tmp_path, world=1, before=[at(moment, 0, signal.SIGTERM)])
    assert ranks.codes == [0] and "mmrep: stopped before the first step;" in ranks.text(), ranks.text()
    assert not (tmp_path / "seen").exists() and newest_step(tmp_path) == -1


def test_a_dry_run_that_is_stopped_leaves_the_earlier_run_as_it_is(tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards)
    assert fit(tmp_path, world=1, before=[at("start", 7, signal.SIGTERM)]).codes == [0]
    before = file_bytes(tmp_path / "runs")
    dry = ["--overwrite", "--trainer.fast_dev_run", "9"]
    ranks = fit(tmp_path, *dry, world=1, before=[at("start", 3, signal.SIGTERM)])
    assert ranks.codes == [0] and "mmrep: stopped: a dry run writes no checkpoint" in ranks.text(), ranks.text()
    assert file_bytes(tmp_path / "runs") == before


@pytest.mark.parametrize(
    ("averaging", "leaves"), [(WeightAveraging(), False), (StochasticWeightAveraging(swa_lrs=1e-2), True)]
)
def test_an_evaluation_is_not_left_with_averages_in_the_module(
    averaging: pl.Callback, leaves: bool, tmp_path: Path
) -> None:
    """Lightning's own averaging puts them there for a validation, and a checkpoint would take them for the weights."""
    trainer = pl.Trainer(callbacks=[averaging], accelerator="cpu", logger=False, default_root_dir=tmp_path)
    averaging.setup(trainer, BoringModel(), "fit")
    trainer.state.fn = TrainerFn.FITTING
    signals = StopSignals()
    signals.received = "SIGTERM"
    with pytest.raises(PreemptedError) if leaves else nullcontext():
        Preemption(signals, tmp_path).between_batches(trainer)


def test_a_second_ctrl_c_after_a_while_stops_at_once(tiny_shards: Path, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)

    write_config(tmp_path, tiny_shards)
    ranks = fit(tmp_path, world=1, before=[calling("start", 3, twice)])
    assert ranks.codes[0] != 0 and "stops now, without a checkpoint" in ranks.text(), ranks.text()
    assert newest_step(tmp_path) == -1


@pytest.mark.parametrize(("moment", "step", "victims"), [("start", 7, (1,)), ("validation", 12, (0, 1))])
def test_a_signal_to_one_rank_or_to_all_stops_all_at_one_step(
    moment: str, step: int, victims: tuple[int, ...], whole: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1)
    ranks = fit(tmp_path, before=[at(moment, step, signal.SIGTERM) if r in victims else None for r in range(2)])
    assert ranks.codes == [0, 0] and "mmrep: stopped after step" in ranks.text(0), ranks.text()
    assert newest_step(tmp_path) == (8 if moment == "start" else 12)
    assert fit(tmp_path, "--resume", "auto").codes == [0, 0]
    assert_same(tmp_path, whole)


def test_stopped_inside_an_accumulated_step_the_run_keeps_its_gradients(tiny_shards: Path, tmp_path: Path) -> None:
    """Two parts a step, and a validation after every third part, half of them inside a step."""
    options = {"trainer__accumulate_grad_batches": 2, "trainer__val_check_interval": 3, "model__init_args__lr": 1e-2}
    for name in ("whole", "stopped"):
        write_config(tmp_path / name, tiny_shards, **options)
    assert fit(tmp_path / "whole", world=1).codes == [0]
    ranks = fit(tmp_path / "stopped", world=1, before=[at("validation", 4, signal.SIGTERM)])
    assert ranks.codes == [0] and newest_step(tmp_path / "stopped") == 4, ranks.text()
    ranks = fit(tmp_path / "stopped", "--resume", "auto", world=1)
    assert ranks.codes == [0], ranks.text()
    assert read(tmp_path / "stopped" / "seen", 1) == read(tmp_path / "whole" / "seen", 1)
    found, expected = weights(tmp_path / "stopped"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_every_process_of_a_run_ends_no_loader_worker(
    number: int, tiny_shards: Path, tmp_path: Path
) -> None:
    """As torchrun, SLURM and a terminal send it."""
    begun = tmp_path / "begun"

    def wait() -> None:
        begun.touch()
        time.sleep(1)

    config = write_config(tmp_path, tiny_shards, data__num_workers=2)
    ranks = launch(["fit", "--config", str(config)], tmp_path, 1, [both(os.setsid, calling("start", 7, wait))])
    (run,) = ranks.processes
    while not begun.exists():
        assert run.is_alive(), ranks.text()
        time.sleep(0.05)
    assert len(of_session(run.pid)) >= 3
    os.killpg(run.pid, number)
    assert ranks.wait(30) == [0] and newest_step(tmp_path) == 8, ranks.text()
    assert ranks.text().count("stops after this step") == 1 and "Traceback" not in ranks.text()
    until = time.monotonic() + 10
    while of_session(run.pid) and time.monotonic() < until:
        time.sleep(0.2)
    assert of_session(run.pid) == []


def of_session(session: int) -> list[int]:
    """The processes of a session."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = place.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found.append(int(place.parent.name))
    return found


def test_without_checkpointing_a_run_writes_one_only_where_it_is_told_to_stop(
    tiny_shards: Path, tmp_path: Path
) -> None:
    write_config(tmp_path, tiny_shards, trainer__enable_checkpointing=False, checkpoint_minutes=1e-5)
    ranks = fit(tmp_path, world=1, before=[at("start", 7, signal.SIGTERM)])
    assert ranks.codes == [0], ranks.text()
    assert [path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir()] == ["stopped.ckpt"]
    ranks = fit(tmp_path, "--overwrite", world=1)
    assert ranks.codes == [0] and weights(tmp_path), ranks.text()
    assert not list((tmp_path / "runs" / "run").rglob("*.ckpt"))
