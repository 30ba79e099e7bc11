"""What the README claims of SwAV on pictures, against the committed result and a short training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import swav_pictures

ROOT = Path(__file__).parents[2]
RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "swav_pictures.json").read_text())


def test_swav_is_read_off_better_than_random_weights_and_pixels() -> None:
    """But for subgroups among the vendors of training, which raw pixels tell as well: there the README says so."""
    for name, probe in RESULT["probes"].items():
        accuracy = {kind: figures["accuracy"] for kind, figures in probe.items()}
        assert accuracy["trained"] > accuracy["random weights"] + 0.04, name
        margin = -0.03 if name == "subgroup, test" else 0.06
        assert accuracy["trained"] > accuracy["raw input"] + margin, name


def test_the_readme_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text()
    for name, probe in RESULT["probes"].items():
        cells = [f"{100 * probe[kind]['accuracy']:.1f}" for kind in swav_pictures.FEATURES]
        assert f"| {name} | {' | '.join(cells)} | {100 * probe['trained']['chance']:.1f} |" in readme
    swav_pictures.print_table(RESULT["probes"])
    assert "subgroup, test_vendor" in capsys.readouterr().out
    assert (ROOT / RESULT["config"]).is_file() and RESULT["machine"] and RESULT["versions"]["torch"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_swav_learns_from_pictures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the configured epochs is enough to pass random weights and raw pixels on a vendor never seen."""
    from data_prep.emoji_pictures import main as build_pictures
    from mmrep.cli import main

    monkeypatch.chdir(ROOT)
    data, out = tmp_path / "pictures", tmp_path / "probe.json"
    assert build_pictures(["--out", str(data)]) == 0
    words = [
        "fit",
        "--config",
        "configs/emoji_pictures/swav.yaml",
        "--data.path",
        str(data),
        "--trainer.max_epochs",
        "10",
    ]
    assert main([*words, "--runs", str(tmp_path), "--name", "swav"]) == 0
    words = ["eval", "probe", "--checkpoint", str(tmp_path / "swav"), "--data", str(data), "--modality", "image"]
    assert main([*words, "--label", "group", "--split", "test_vendor", "--out", str(out)]) == 0
    accuracy = {kind: figures["accuracy"] for kind, figures in json.loads(out.read_text())["features"].items()}
    assert accuracy["trained"] > max(accuracy["random weights"], accuracy["raw input"]) + 0.05
