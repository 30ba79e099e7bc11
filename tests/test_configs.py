"""Every config of the project is what its header says, and is accepted by the real command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

import mmrep
from mmrep.cli.train import TrainCLI
from tests.gloo_pool import GlooPool

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RELEASES = ("coco", "clotho", "audiocaps", "symile_m3", "symile_mimic", "cmu_mosei")
"""Folders whose configs ask for towers or modalities that are not here: tests/data_prep/test_release_configs.py has them."""
OF_A_RANK = ("train/samples_per_second", "train/data_wait_share")
"""What a rank's own clock says; the first rank's is written."""
OWN = [path for path in CONFIGS if path.parent.name not in RELEASES]


class ParseOnly(TrainCLI):
    """Parses and builds the model; trains nothing."""

    def before_instantiate_classes(self) -> None:
        return

    def after_instantiate_classes(self) -> None:
        return

    def _run_subcommand(self, subcommand: str) -> None:
        return

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_config_builds_its_model(path: Path) -> None:
    cli = ParseOnly(["fit", "--config", str(path)])
    assert cli.model.model.embed_dim == yaml.safe_load(path.read_text())["model"]["init_args"]["embed_dim"]
    assert set(cli.model.model.modalities) == set(yaml.safe_load(path.read_text())["model"]["init_args"]["encoders"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_names_what_it_trains_and_the_launch_command(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ") and f"mmrep fit --config {path.relative_to(ROOT)}" in text and "# Data:" in text


def test_symile_and_clip_are_compared_with_equal_encoders_and_data() -> None:
    clip, symile = (
        yaml.safe_load((ROOT / f"configs/emoji_m3/joint_{name}.yaml").read_text()) for name in ("clip", "symile")
    )
    assert clip["data"] == symile["data"] and clip["seed_everything"] == symile["seed_everything"]
    for key in ("encoders", "embed_dim", "lr", "weight_decay", "warmup_steps"):
        assert clip["model"]["init_args"][key] == symile["model"]["init_args"][key]


def fit_as_a_rank(
    rank: int, path: str, shards: str, runs: str, options: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``mmrep fit`` as one of two processes of a launcher; gives the sums of the weights, and the logged figures."""
    launcher = {"TORCHELASTIC_RUN_ID": "1", "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2}
    launcher |= {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    words = ["fit", "--config", path, "--data.path", shards, "--runs", runs, *options]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launcher.items():
            patch.setenv(name, str(value))
        cli = TrainCLI(words)
    weights = {name: float(value.double().sum()) for name, value in cli.model.state_dict().items()}
    figures = {name: float(value) for name, value in cli.trainer.callback_metrics.items() if name not in OF_A_RANK}
    return weights, figures


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_config_trains_on_two_processes(path: Path, pool2: GlooPool, tiny_shards: Path, tmp_path: Path) -> None:
    """From its YAML to two steps, a validation and a model folder; both ranks end with the same weights."""
    options = ["--data.global_batch_size", "16", "--data.num_workers", "0", "--trainer.max_epochs", "1"]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    options += ["--trainer.log_every_n_steps", "1", "--trainer.num_sanity_val_steps", "0"]
    words = (str(path), str(tiny_shards), str(tmp_path), options)
    (weights, figures), (others, other_figures) = pool2.run(fit_as_a_rank, [(0, *words), (1, *words)], timeout=120)
    assert weights == others and all(math.isfinite(value) for value in weights.values())
    assert figures == other_figures and math.isfinite(figures["train/loss"])
    model = mmrep.load(tmp_path / path.stem)
    assert set(model.modalities) == set(yaml.safe_load(path.read_text())["model"]["init_args"]["encoders"])
    if len(model.modalities) > 1:
        assert (
            0
            <= figures["val/audio+text->image/recall@1" if "audio" in model.modalities else "val/text->image/recall@1"]
            <= 1
        )
