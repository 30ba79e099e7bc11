"""Faults of a run of weeks: what they cost, and that nothing hangs. See docs/faults.md."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.launched import at, launch, read

EPOCHS, STEPS = 3, 18
ENCODERS = {
    "image": {"class_path": "mmrep.encoders.ConvImageEncoder", "init_args": {"image_size": 16, "width": 8}},
    "text": {"class_path": "mmrep.encoders.NgramTextEncoder", "init_args": {"width": 16, "buckets": 512}},
}


def write_config(folder: Path, shards: Path, **more: Any) -> Path:
    """A run of two modalities, six steps an epoch, that records what it sees in ``seen`` beside the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = {"class_path": "tests.launched.Recorder", "init_args": {"folder": str(folder / "seen")}}
    config: dict[str, Any] = {
        "model": {
            "class_path": "mmrep.modules.PairwiseCLIP",
            "init_args": {"embed_dim": 8, "lr": 5e-3, "warmup_steps": 2, "encoders": ENCODERS},
        },
        "data": {"path": str(shards), "global_batch_size": 8, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "max_epochs": EPOCHS, "callbacks": [recorder], "num_sanity_val_steps": 0},
        "runs": str(folder / "runs"),
        "name": "run",
    }
    for path, value in more.items():
        part = config
        *sections, last = path.split("__")
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def fit(folder: Path, *options: str, world: int = 2, before: Any = (), timeout: float = 120.0) -> Any:
    """One start of the run, to its end."""
    arguments = ["fit", "--config", str(folder / "config.yaml"), *options]
    ranks = launch(arguments, folder / "logs", world, before)
    ranks.wait(timeout)
    return ranks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "runs" / "run" / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """The run that nothing stopped, on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder, tiny_shards)
    ranks = fit(folder)
    assert ranks.codes == [0, 0], ranks.text()
    assert len(read(folder / "seen")) == STEPS
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    """The samples of every batch, their order, and all weights are those of the run that nothing stopped."""
    seen, expected = read(folder / "seen"), read(whole / "seen")
    assert seen == expected
    found = weights(folder)
    for name, tensor in weights(whole).items():
        assert torch.equal(found[name], tensor), name


def newest_step(folder: Path) -> int:
    """Steps of the newest checkpoint, as a resume would find it."""
    from mmrep.cli.resume import newest_intact

    path = newest_intact(folder / "runs" / "run" / "checkpoints")
    return -1 if path is None else int(torch.load(path, weights_only=True, mmap=True)["global_step"])


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
    write_config(tmp_path, tiny_shards, checkpoint__every_n_train_steps=2)
    kill_and_go_on(tmp_path, [("gradients", 5, (1,)), ("writing", 10, (0,))])
    assert_same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3])
def test_killed_ten_times_at_random_moments(every: int, whole: Path, tiny_shards: Path, tmp_path: Path) -> None:
    """SIGKILL of one rank or both, at random steps and moments, the writing of a checkpoint among them."""
    rng = random.Random(every)
    write_config(tmp_path, tiny_shards, checkpoint__every_n_train_steps=every)
    kills = []
    for step in sorted(rng.choices(range(1, STEPS - every), k=10)):
        moment = rng.choice(MOMENTS)
        kills.append((moment, step, (0,) if moment in ("writing", "written") else rng.choice([(0,), (1,), (0, 1)])))
    kill_and_go_on(tmp_path, kills)
    assert_same(tmp_path, whole)
