"""What the README claims of the objectives on real data, against the committed result and a short training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import objectives

ROOT = Path(__file__).parents[2]
ROWS = {
    (row["task"], row["objective"]): row
    for row in json.loads((ROOT / "benchmarks" / "results" / "objectives.json").read_text())["rows"]
}


def recall(task: str, objective: str, direction: str) -> float:
    figure: float = ROWS[task, objective]["directions"][direction]["recall@1"]
    return figure


def test_every_case_has_a_result_and_a_config() -> None:
    assert list(ROWS) == [(case.task, case.objective) for case in objectives.CASES]
    assert all((ROOT / row["config"]).is_file() for row in ROWS.values())


def test_symile_beats_pairs_by_a_wide_margin_where_no_pair_tells() -> None:
    symile, clip = (recall("joint", name, objectives.JOINT_DIRECTION) for name in ("Symile", "pairwise CLIP"))
    assert symile > 0.5 + 0.15 and clip < 0.5 + 0.03


def test_clip_holds_where_pairs_tell() -> None:
    for direction in objectives.SINGLE:
        assert recall("plain", "pairwise CLIP", direction) > 10 / 64


def test_swav_is_read_off_better_than_random_weights_and_pixels() -> None:
    """But for subgroups among the vendors of training, which raw pixels tell as well: there the README says so."""
    for name, probe in ROWS["pictures", "SwAV"]["probes"].items():
        accuracy = {kind: figures["accuracy"] for kind, figures in probe.items()}
        assert accuracy["trained"] > accuracy["random weights"] + 0.04, name
        margin = -0.03 if name == "subgroup, test" else 0.06
        assert accuracy["trained"] > accuracy["raw input"] + margin, name


def test_cluster_swap_and_views_find_across_modalities() -> None:
    for direction in objectives.SINGLE:
        assert recall("plain", "cross-modal SwAV", direction) > 5 / 64
        assert recall("plain", "modality-pairwise", direction) > 10 / 64


def test_tables_print_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    objectives.print_tables(list(ROWS.values()))
    out = capsys.readouterr().out
    assert all(case.objective in out for case in objectives.CASES)


def test_a_partial_run_keeps_the_other_rows(tmp_path: Path) -> None:
    out = tmp_path / "objectives.json"
    out.write_text(json.dumps({"rows": list(ROWS.values())}))
    new: dict[str, Any] = {**ROWS["joint", "Symile"], "seconds": -1}
    objectives.keep(out, new)
    rows = json.loads(out.read_text())["rows"]
    assert all(row["machine"] and row["versions"]["torch"] for row in rows)
    assert [row["seconds"] == -1 for row in rows] == [row["objective"] == "Symile" for row in rows]


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
