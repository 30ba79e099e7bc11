"""The benchmark of retrieval: both sides find the same, and the committed rows have their gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import retrieval

RESULT = Path(__file__).parents[2] / retrieval.RESULT


class Peer:
    """CLIP_benchmark's two functions as they are, for where it is not installed."""

    @staticmethod
    def recall_at_k(scores: Tensor, positive_pairs: Tensor, k: int) -> Tensor:
        chosen = torch.nn.functional.one_hot(torch.topk(scores, k, dim=1)[1], num_classes=scores.shape[1])
        hits = (chosen * positive_pairs.view(len(scores), 1, -1)).sum(dim=(1, 2))
        return hits / positive_pairs.sum(dim=1)

    @staticmethod
    def batchify(function: Any, x: Tensor, y: Tensor, batch_size: int, device: str, **options: Any) -> Tensor:
        parts = [slice(start, start + batch_size) for start in range(0, len(x), batch_size)]
        return torch.cat([function(x[part], y[part], **options) for part in parts])


def test_both_sides_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_peer", Peer)
    images, texts = retrieval.features(700)
    found = retrieval.ours(images, texts)
    assert found == retrieval.theirs(images, texts) and 0.2 < found["image_retrieval_recall@1"] < 0.99


def test_a_difference_is_an_error_and_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "SMALL", 300)
    monkeypatch.setattr(retrieval, "measure", retrieval.measure_here)
    monkeypatch.setitem(retrieval.SIDES, "theirs", lambda images, texts: {"image_retrieval_recall@1": 0.5})
    with pytest.raises(RuntimeError, match="the figures differ"):
        retrieval.small_rows(1)


def test_the_committed_result_has_the_gates() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    gates = {(row["case"].split(" ")[0], row["metric"]): row["gate"] for row in rows if row["gate"] is not None}
    assert gates == {
        ("20,000", "CPU s"): 0.5,
        ("20,000", "MiB at the peak"): 0.05,
        ("100,000", "CPU s"): 1.0,
        ("100,000", "MiB at the peak"): 1.0,
    }
    assert all(row["held"] == (row["ratio"] <= row["gate"]) for row in rows if row["gate"] is not None)
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) for row in rows)


def test_readme_and_page_say_what_was_measured() -> None:
    for page in ("README.md", "docs/evaluation.md"):
        text = (RESULT.parents[2] / page).read_text()
        for row in json.loads(RESULT.read_text())["rows"]:
            line = (
                f"| {row['case']} | {row['metric']} | {row['ours']:,.1f} | {row['theirs']:,.1f} | {row['theirs_is']} |"
            )
            assert f"{line} {row['ratio']:.3f} |" in text, (page, line)
