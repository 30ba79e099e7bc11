"""Alignment, uniformity and modality gap against their literal sums."""

from __future__ import annotations

import math

import pytest
import torch

from mmrep.evaluation.geometry import alignment, geometry, modality_gap, uniformity
from tests.losses.cases import random_presence, unit_rows


def test_literal_sums() -> None:
    rows = unit_rows(("a", "b"), 7, 5)
    a, b = rows["a"], rows["b"]
    assert float(alignment(a, b)) == pytest.approx(float((2 - 2 * (a * b).sum(dim=1)).mean()))
    pairs = [math.exp(-2 * float((a[i] - a[j]).square().sum())) for i in range(7) for j in range(i)]
    assert float(uniformity(a)) == pytest.approx(math.log(sum(pairs) / len(pairs)))
    assert float(modality_gap(a, b)) == pytest.approx(float((a.mean(dim=0) - b.mean(dim=0)).norm()))


def test_extremes() -> None:
    same = torch.ones(4, 3) / math.sqrt(3)
    assert float(alignment(same, same)) == 0 and float(uniformity(same)) == pytest.approx(0, abs=1e-6)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(uniformity(opposite)) == pytest.approx(-8) and float(modality_gap(same, -same)) == pytest.approx(2)


def test_absent_rows_take_no_part_and_lengths_do_not_matter() -> None:
    rows, present = unit_rows(("a", "b", "c"), 12, 5), random_presence(("a", "b", "c"), 12)
    figures = geometry({name: 3 * r for name, r in rows.items()}, present)
    assert set(figures) == {
        *(f"{kind}/{pair}" for kind in ("alignment", "modality_gap") for pair in ("a-b", "a-c", "b-c")),
        *(f"uniformity/{name}" for name in rows),
    }
    both = present["a"] & present["b"]
    assert float(figures["alignment/a-b"]) == pytest.approx(
        float(alignment(rows["a"][both], rows["b"][both])), abs=1e-6
    )
    assert float(figures["uniformity/c"]) == pytest.approx(float(uniformity(rows["c"][present["c"]])), abs=1e-5)


def test_what_cannot_be_measured_is_left_out() -> None:
    rows = unit_rows(("a", "b"), 3, 4)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert set(geometry(rows, {"a": ~nothing, "b": nothing})) == {"uniformity/a"}
    assert float(uniformity(unit_rows(("a",), 9000, 8)["a"])) < -1  # thinned out, not 40 million pairs
