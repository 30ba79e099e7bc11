"""Every config of the project is what its header says, and is accepted by the real command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmrep.cli.train import TrainCLI

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
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
