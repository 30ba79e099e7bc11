"""CLIP_benchmark 1.6.2, unmodified and in its own process, and mmrep on one model and the same folders: the same figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import clip_benchmark_peer
from data_prep.clip_benchmark import convert
from mmrep.cli import main
from tests.evaluation.pictures import write_open_clip, write_pictures

KS = ("1", "5", "10")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shards in both layouts, and a model folder of open_clip's."""
    try:
        clip_benchmark_peer.overlay()
    except OSError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("clip_benchmark")
    shards = write_pictures(root / "shards")
    assert convert(shards, "test", root / "classes", label="label") == 240
    assert convert(shards, "test", root / "captions") == 240
    return {"root": root, "model": write_open_clip(root / "model")}


def theirs(folders: dict[str, Path], dataset: str, task: str) -> dict[str, Any]:
    """What their program writes."""
    out = folders["root"] / f"theirs-{task}.json"
    done = clip_benchmark_peer.run(
        ["eval", "--dataset", f"wds/{dataset}", "--dataset_root", str(folders["root"] / dataset), "--split", "test",
         "--model", f"local-dir:{folders['model']}", "--task", task, "--no_amp", "--batch_size", "64", "--num_workers",
         "0", "--recall_k", *KS, "--output", str(out)]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def ours(folders: dict[str, Path], dataset: str, task: str) -> dict[str, Any]:
    """What `mmrep eval` writes for the same, in their format."""
    out = folders["root"] / f"ours-{task}.json"
    model = f"open_clip:local-dir:{folders['model']}"
    arguments = ["eval", task, "--checkpoint", model, "--data", str(folders["root"] / dataset), "--batch-size", "50"]
    assert main([*arguments, "--device", "cpu", "--out-clip-benchmark", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_classification_is_theirs_to_the_last_digit(folders: dict[str, Path]) -> None:
    expected, found = theirs(folders, "classes", "zeroshot_classification"), ours(folders, "classes", "classification")
    assert found["task"] == expected["task"] and set(expected["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert 0.2 < expected["metrics"]["acc1"] < 1, "the model is neither at chance nor perfect"
    assert found["metrics"] == expected["metrics"]


@pytest.mark.slow
def test_retrieval_is_theirs_to_the_last_digit(folders: dict[str, Path]) -> None:
    expected, found = theirs(folders, "captions", "zeroshot_retrieval"), ours(folders, "captions", "retrieval")
    names = {f"{target}_retrieval_recall@{k}" for target in ("image", "text") for k in KS}
    assert set(expected["metrics"]) == names and 0.02 < expected["metrics"]["image_retrieval_recall@1"] < 0.98
    assert found["metrics"] == expected["metrics"]


@pytest.mark.slow
def test_their_build_takes_our_results(folders: dict[str, Path]) -> None:
    files = [folders["root"] / f"ours-{task}.json" for task in ("classification", "retrieval")]
    for file, dataset in zip(files, ("classes", "captions"), strict=True):
        if not file.is_file():
            ours(folders, dataset, file.stem.removeprefix("ours-"))
    table = folders["root"] / "benchmark.csv"
    done = clip_benchmark_peer.run(["build", *map(str, files), "--output", str(table)])
    assert done.returncode == 0, done.stderr[-2000:]
    with table.open(newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    metrics = json.loads(files[0].read_text())["metrics"]
    assert float(rows["zeroshot_classification"]["acc1"]) == metrics["acc1"]
    assert np.float32(rows["zeroshot_retrieval"]["text_retrieval_recall@5"]) > 0
    assert rows["zeroshot_retrieval"]["model_fullname"] == f"open_clip:local-dir:{folders['model']} mmrep"
