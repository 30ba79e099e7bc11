"""Our results as the JSON that ``clip_benchmark build`` reads: its names, and figures rounded as it rounds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrep.evaluation.metrics import KS

RETRIEVAL_NAMES = {"text->image": "image_retrieval_recall", "image->text": "text_retrieval_recall"}
"""CLIP_benchmark names a direction by what is retrieved; ours that it does not know keep their own name."""
CLASSIFICATION_METRICS = ("acc1", "acc5", "mean_per_class_recall", "mean_average_precision")


def clip_benchmark_json(result: Mapping[str, Any]) -> dict[str, Any]:
    """What ``mmrep eval retrieval`` or ``mmrep eval classification`` found, as CLIP_benchmark would write it.

    Returns:
        ``dataset``, ``model``, ``pretrained``, ``task``, ``language`` and ``metrics``; None where there is no figure.
    """
    retrieval = result["task"] == "retrieval"
    return {
        "dataset": result["data"],
        "model": result["checkpoint"],
        "pretrained": "mmrep",
        "task": "zeroshot_retrieval" if retrieval else "zeroshot_classification",
        "language": result.get("language", "en"),
        "metrics": _recalls(result["directions"]) if retrieval else _accuracies(result),
    }


def _recalls(directions: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    found = {}
    for direction, figures in directions.items():
        name = RETRIEVAL_NAMES.get(direction, f"{direction.replace('->', '_to_')}_recall")
        for k in KS:
            recall = figures[f"recall@{k}"]
            found[f"{name}@{k}"] = None if recall is None else float(np.float32(recall))  # theirs is a mean in fp32
    return found


def _accuracies(result: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: result[name] for name in CLASSIFICATION_METRICS if name in result}
