"""SIGKILL at any moment: the run ends as if nothing had been."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
import torch

from tests.launched import at
from tests.modules.fault_tolerance.running import STEPS, assert_same, fit, newest_step, weights, write_config

MOMENTS = ("start", "gradients", "end", "writing", "written")


def kill_and_go_on(folder: Path, kills: list[tuple[str, int, tuple[int, ...]]]) -> None:
    """Kill the run at moments of steps, on some of its two ranks; start it again each time; and once to the end."""
    for moment, step, victims in kills:
        before = [at(moment, step) if rank in victims else None for rank in range(2)]
        ranks = fit(folder, "--resume", "auto", before=before)
        assert all(ranks.codes[rank] == -signal.SIGKILL for rank in victims), ranks.text()
        for rank in {0, 1} - set(victims):
            assert ranks.codes[rank] == 2 and len(ranks.errors(rank)) == 1, ranks.text(rank)
            assert "--resume auto" in ranks.errors(rank)[0]
    assert fit(folder, "--resume", "auto").codes == [0, 0]


def test_killed_twice_the_run_ends_as_if_nothing_had_been(whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1, checkpoint__every_n_train_steps=2)
    kill_and_go_on(tmp_path, [("gradients", 5, (1,)), ("writing", 10, (0,))])
    assert_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3])
def test_killed_ten_times_at_random_moments(every: int, whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """SIGKILL of one rank or both, at random steps and moments, the writing of a checkpoint among them."""
    rng = random.Random(every)
    write_config(tmp_path, tiny_shards, trainer__log_every_n_steps=1, checkpoint__every_n_train_steps=every)
    kills = []
    for step in sorted(rng.choices(range(1, STEPS - every), k=10)):
        moment = rng.choice(MOMENTS)
        kills.append((moment, step, (0,) if moment in ("writing", "written") else rng.choice([(0,), (1,), (0, 1)])))
    kill_and_go_on(tmp_path, kills)
    assert_same(tmp_path, whole)


def test_by_the_clock_and_by_steps_at_once(alone: Path, tiny_shards: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_shards, checkpoint__every_n_train_steps=4)
    options = ("--checkpoint_minutes", "0.00001", "--checkpoint.train_time_interval", "null")
    ranks = fit(tmp_path, *options, world=1, before=[at("start", 7)])
    assert ranks.codes == [-signal.SIGKILL]
    names = {path.name for path in (tmp_path / "runs" / "run" / "checkpoints").glob("*.ckpt")}
    assert names == {"epoch=0-step=4.ckpt", "last.ckpt", "timed.ckpt"} and newest_step(tmp_path) == 7
    assert fit(tmp_path, "--resume", "auto", world=1).codes == [0]
    assert all(torch.equal(tensor, weights(alone)[name]) for name, tensor in weights(tmp_path).items())
