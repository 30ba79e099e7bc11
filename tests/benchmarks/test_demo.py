"""What the README claims of the demo, measured by the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import demo

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_symile_passes_the_pairwise_ceiling_and_clip_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "demo"
    assert demo.main(["--data", str(tmp_path / "emoji_m3"), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"joint", "chance", "pairwise_ceiling", "seconds"}
    assert set(results["seconds"]) == {"setup", "data", "train", "eval"}
    assert results["pairwise_ceiling"] == 0.5 and results["chance"] == pytest.approx(1 / 64, abs=0.002)
    recall = {name: result["directions"][demo.DIRECTION]["recall@1"] for name, result in results["joint"].items()}
    assert recall["symile"] >= results["pairwise_ceiling"] + 0.10
    assert recall["clip"] <= results["pairwise_ceiling"] + 0.03
    assert min(Image.open(out / "report.png").size) > 500


def test_the_demo_passes_on_the_code_of_the_step_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    assert demo.main(["--data", str(tmp_path / "data" / "thesis.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "failed" in capsys.readouterr().err


def test_the_readme_has_the_figures_of_the_kept_run() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for title, objective in (("pairwise CLIP", "clip"), ("Symile, shuffled negatives", "symile")):
        figures = kept["joint"][objective]["directions"][demo.DIRECTION]
        assert (figures["queries"], figures["candidates"]) == (1024, 64)
        recall, recall_5, chance = (100 * figures[name] for name in ("recall@1", "recall@5", "chance_recall@1"))
        low, high = (100 * bound for bound in figures["recall@1_ci95"])
        cells = (
            f"{recall:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{recall_5:.1f}",
            f"{figures['mrr']:.3f}",
            f"{chance:.1f}",
        )
        assert f"| {title} | {' | '.join(cells)} |\n" in readme
    assert kept["pairwise_ceiling"] == 0.5
    seconds = {name: f"{value:.0f} s" for name, value in kept["seconds"].items()}
    assert (
        f"{seconds['train']} of training, {seconds['eval']} of evaluation, before that {seconds['data']} of data"
        in readme
    )
