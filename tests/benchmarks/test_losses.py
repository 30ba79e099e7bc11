"""The benchmark of the losses: its rows, its gates, and the bytes it counts. Its speeds are not tested: machines are noisy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import losses
from benchmarks.measure import Row
from benchmarks.traffic import RANKS, ROWS, WIDTH, bytes_sent

RESULT = Path(__file__).parents[2] / losses.RESULT


def test_a_gate_is_held_up_to_its_ratio() -> None:
    assert Row.of("a", "s", 1.0, 2.0, "b", 0.5).held is True and Row.of("a", "s", 1.1, 2.0, "b", 0.5).held is False
    assert Row.of("a", "s", 1.0, 2.0, "b").held is None


def test_it_prints_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "losses.json"
    assert losses.main(["--only", "M=4 N=48", "--rounds", "1", "--out", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) and row["held"] == (row["ratio"] <= row["gate"])
    assert losses.main(["--only", "N=128", "--rounds", "1", "--keep", "--out", str(out)]) == 0
    assert [entry["case"] for entry in json.loads(out.read_text())["rows"]] == [row["case"], "CLIP N=128 D=512"]
    assert "M=4 N=48" in capsys.readouterr().out and {"machine", "versions"} <= result.keys()


def test_the_committed_result_has_every_case_and_its_gates() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    found = {(row["case"], row["metric"]): row for row in rows}
    for metric, cases in (("CPU s", losses.TIMES), ("peak MiB", losses.MEMORY)):
        for case, (gate, aim) in cases.items():
            row = found[case, metric]
            assert row["gate"] == (None if gate is None else pytest.approx(gate))
            assert row["aim"] == (None if aim is None else pytest.approx(aim))
    assert all(row["held"] == (None if row["gate"] is None else row["ratio"] <= row["gate"]) for row in rows)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_one_side_travels_and_its_gradient_in_fp32(dtype: torch.dtype, size: int) -> None:
    everyone, others = RANKS * ROWS, (RANKS - 1) / RANKS
    sums = 3 * 2 * others * everyone * 4  # of columns: their maximum, their sum, and its gradient, each to all
    counts_and_flags = 2 * others * RANKS * 8 + others * everyone * 2
    expected = others * everyone * WIDTH * (size + 4) + sums + counts_and_flags
    assert bytes_sent("ours", dtype) == pytest.approx(expected, rel=1e-6)


GROWTH = """
import torch
from benchmarks.measure import peak_growth

print(peak_growth(lambda: torch.ones(2**25).sum(), lambda: None), peak_growth(lambda: None, lambda: torch.ones(2**25).sum()))
"""


def test_growth_of_the_peak_sees_what_a_step_allocates_and_nothing_before_it() -> None:
    """In a process of its own, as it is meant for: elsewhere memory that was freed is used again."""
    found = subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True, text=True).stdout
    nothing, some = (int(size) for size in found.split())
    assert nothing < 2**24 and 0.9 * 2**27 < some < 1.3 * 2**27
