"""A pretrained open_clip model is trained further by the command line, resumed, and handed back to open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mmrep
from mmrep.cli import main
from mmrep.encoders.open_clip import LOCAL
from tests.interop.open_clip_models import NATIVE, hf_text, write_open_clip_folder
from tests.interop.test_open_clip import TEXTS, features, pictures, theirs

WEIGHTS = "open_clip_model.safetensors"


def write_config(tmp: Path, source: Path, shards: Path, **model: Any) -> Path:
    towers = {"pretrained": f"{LOCAL}{source}", "projection": False}
    encoders = {
        "image": {"class_path": "mmrep.encoders.OpenClipImageEncoder", "init_args": towers},
        "text": {"class_path": "mmrep.encoders.OpenClipTextEncoder", "init_args": towers},
        "audio": {"class_path": "mmrep.encoders.MelAudioEncoder", "init_args": {"seconds": 0.2, "width": 16}},
    }
    init = {"embed_dim": 24, "lr": 1e-3, "warmup_steps": 1, "encoders": encoders, **model}
    config = {
        "model": {"class_path": "mmrep.modules.PairwiseCLIP", "init_args": init},
        "data": {"path": str(shards), "global_batch_size": 16, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "max_epochs": 1},
        "runs": str(tmp / "runs"),
    }
    path = tmp / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("kind", ["native", "hf text"])
def test_pretrained_towers_are_trained_on_and_handed_back(kind: str, tiny_shards: Path, tmp_path: Path) -> None:
    source = write_open_clip_folder(tmp_path / "in", NATIVE if kind == "native" else hf_text(tmp_path / "hf"))
    config = write_config(tmp_path, source, tiny_shards)
    assert main(["fit", "--config", str(config), "--name", "still", "--model.init_args.lr", "0"]) == 0
    still = mmrep.load(tmp_path / "runs" / "still").encode(image=pictures(), text=TEXTS)
    before = features(theirs(source))
    assert torch.equal(still["image"], before["image"]) and torch.equal(still["text"], before["text"])

    assert main(["fit", "--config", str(config), "--name", "tuned"]) == 0
    assert (
        main(["fit", "--config", str(config), "--name", "tuned", "--resume", "auto", "--trainer.max_epochs", "2"]) == 0
    )
    run = tmp_path / "runs" / "tuned"
    words = ["--checkpoint", str(run), "--format", "open_clip", "--out", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    tuned = mmrep.load(run).encode(image=pictures(), text=TEXTS)
    after = features(theirs(tmp_path / "out"))
    assert torch.equal(tuned["image"], after["image"]) and torch.equal(tuned["text"], after["text"])
    old, new = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    for tower in ("visual.conv1.weight", "visual.proj"):
        assert not torch.equal(old[tower], new[tower])

    source.rename(tmp_path / "gone")  # a checkpoint holds all that its model needs
    from_checkpoint = mmrep.load(run / "checkpoints" / "last.ckpt").encode(image=pictures(), text=TEXTS)
    assert all(torch.equal(from_checkpoint[name], tuned[name]) for name in tuned)


def test_a_pretrained_source_that_is_not_there_stops_the_run_before_it_starts(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tmp_path / "nowhere", tiny_shards)
    assert main(["fit", "--config", str(config)]) == 2
    error = capsys.readouterr().err.strip()
    assert "no such folder" in error and "nowhere" in error and error.count("\n") == 0
    assert not (tmp_path / "runs").exists()
