"""What the page of whole corpora says of time is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import corpus_scale

ROOT = Path(__file__).parents[2]


def test_the_page_says_what_was_measured() -> None:
    rows = {row["case"]: row for row in json.loads((ROOT / corpus_scale.RESULT).read_text())["rows"]}
    page = " ".join((ROOT / "docs/corpus_scale.md").read_text().split())
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        assert f"{row['ratio']:.2f} times" in page or f"{row['ratio']:.0f} times" in page, row["case"]
