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
    said = {
        "shards of 2,000 pictures, two processes": "two processes make shards with {:.2f} times the CPU time",
        "shards of 2,000 pictures, one process, Parquet": "Parquet with bytes in it takes {:.2f} times the CPU time",
        "shards of 2,000 pictures, two Ray workers": "two workers take {:.0f} times the wall time to make the shards",
        "embeddings of 2,000 pictures and texts, two Ray workers": "and {:.0f} times to embed them",
        "start of Ray": "starting Ray itself takes {:.0f} times that of embedding",
    }
    assert rows.keys() == said.keys()
    for case, row in rows.items():
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        assert said[case].format(row["ratio"]) in page, case


@pytest.mark.parametrize("words", [["--only", "shards"], ["--keep"]])
def test_options_that_it_has_not_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        corpus_scale.main(words)
