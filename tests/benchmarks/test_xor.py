"""The XOR sweep: what is learned against the best possible, and the information there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import xor

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "xor.json"


@pytest.mark.slow
@pytest.mark.parametrize("p", [p for p in xor.SWEEP if p >= 0.3])
def test_symile_reaches_the_best_possible_accuracy(p: float) -> None:
    found, _ = xor.accuracy(xor.train("Symile", p), p)
    assert found == pytest.approx(xor.bayes(p), abs=0.01)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_pairwise_clip_is_at_chance(p: float) -> None:
    found, _ = xor.accuracy(xor.train("pairwise CLIP", p, epochs=10), p)
    assert found == pytest.approx(1 / xor.CODES, abs=0.015)


@pytest.mark.parametrize(
    ("p", "a_c", "a_b_given_c", "total"),
    [
        (0.0, 3.4657, 0.0, 3.4657),
        (0.2, 2.3088, 0.6722, 2.9810),
        (0.5, 1.1097, 1.6845, 2.7942),
        (0.8, 0.2712, 2.7097, 2.9810),
        (1.0, 0.0, 3.4657, 3.4657),
    ],
)
def test_information_of_the_whole_table(p: float, a_c: float, a_b_given_c: float, total: float) -> None:
    found = xor.information(p)
    assert found["I(a;c)"] == pytest.approx(a_c, abs=1e-4)
    assert found["I(a;b|c)"] == pytest.approx(a_b_given_c, abs=1e-4)
    assert found["total correlation"] == pytest.approx(total, abs=1e-4)
    assert found["I(a;b)"] == pytest.approx(0, abs=1e-12) and found["I(b;c)"] == pytest.approx(0, abs=1e-12)


def test_the_command_writes_table_json_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(xor, "SWEEP", (0.0, 1.0))
    monkeypatch.setattr(xor, "sweep", lambda cases, _processes: map(xor.run_case, cases))
    monkeypatch.setattr(xor, "TRAIN", 1_000)
    monkeypatch.setattr(xor, "TEST", 100)
    assert xor.main(["--out", str(tmp_path), "--epochs", "1"]) == 0
    result = json.loads((tmp_path / "xor.json").read_text())
    assert [row["case"] for row in result["rows"]] == [name for name in xor.OBJECTIVES for _ in range(2)]
    assert result["rows"][1]["bayes"] == 1 and result["machine"] and result["versions"]["torch"]
    assert min(Image.open(tmp_path / "xor.png").size) > 400
    assert "Symile" in capsys.readouterr().out


def test_the_committed_result_says_what_the_readme_says() -> None:
    """Symile at the best possible from p = .3 on; ConFu's perceptron too; volume, area and pairs far below."""
    rows = {(row["case"], row["p"]): row["accuracy"] for row in json.loads(RESULT.read_text())["rows"]}
    assert set(rows) == {(name, p) for name in xor.OBJECTIVES for p in xor.SWEEP}
    for p in (p for p in xor.SWEEP if p >= 0.3):
        assert rows["Symile", p] == pytest.approx(xor.bayes(p), abs=0.01)
        assert rows["ConFu", p] == pytest.approx(xor.bayes(p), abs=0.02)
        assert rows["pairwise CLIP", p] == pytest.approx(1 / xor.CODES, abs=0.015)
        for rival in ("GRAM", "TRIANGLE"):
            assert rows[rival, p] < xor.bayes(p) - 0.1
