"""CLIP_benchmark 1.6.2, unmodified and in its own process, on a model that we exported: the figures are ours."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mmrep
from benchmarks import clip_benchmark_peer
from data_prep.clip_benchmark import convert
from data_prep.emoji_m3.__main__ import main as build_emoji_m3
from mmrep.cli import main
from mmrep.interop.open_clip import export_open_clip
from tests.evaluation.pictures import train, write_open_clip, write_pictures

KS = ("1", "5", "10")
EMOJI = Path(__file__).parents[2] / "data" / "emoji_m3" / "plain"


@dataclass(frozen=True)
class Case:
    """A data set in their layout, once for each task; a model of ours, and the same as we export it."""

    root: Path
    split: str


@pytest.fixture(scope="module", params=["drawn", "emoji-m3"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A small open_clip model with random weights, loaded, trained, saved and exported by mmrep."""
    clip_benchmark_peer.overlay()
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "drawn":
        shards, split, train_split = write_pictures(root / "shards"), "test", "test"
    else:
        shards, split, train_split = EMOJI, "test_both", "train"
        if not (EMOJI / "index.json").is_file():
            assert build_emoji_m3(["--out", str(root), "--size", "mini", "--task", "plain"]) == 0
            shards = root / "plain"
    assert convert(shards, split, root / "classes", label="label") >= 240
    assert convert(shards, split, root / "captions") >= 60
    model = mmrep.load(f"open_clip:local-dir:{write_open_clip(root / 'random')}")
    train(model, shards, train_split, steps=60 if train_split == "test" else 500)
    model.save_pretrained(root / "ours")
    export_open_clip(model, root / "exported")
    return Case(root, split)


def theirs(case: Case, dataset: str, task: str) -> dict[str, Any]:
    """What their program writes of the exported model."""
    out = case.root / f"theirs-{task}.json"
    done = clip_benchmark_peer.run(
        ["eval", "--dataset", f"wds/{dataset}", "--dataset_root", str(case.root / dataset), "--split", case.split,
         "--model", f"local-dir:{case.root / 'exported'}", "--task", task, "--no_amp", "--batch_size", "64",
         "--num_workers", "0", "--recall_k", *KS, "--output", str(out)]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def ours(case: Case, dataset: str, task: str) -> dict[str, Any]:
    """What `mmrep eval` writes of our model in their format."""
    out = case.root / f"ours-{task}.json"
    data = ["--data", str(case.root / dataset), "--split", case.split, "--batch-size", "50", "--device", "cpu"]
    more = ["--overwrite", "--out-clip-benchmark", str(out)]
    assert main(["eval", task, "--checkpoint", str(case.root / "ours"), *data, *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.slow
def test_classification_is_theirs_to_the_last_digit(case: Case) -> None:
    expected, found = theirs(case, "classes", "zeroshot_classification"), ours(case, "classes", "classification")
    assert found["task"] == expected["task"] and set(expected["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    assert 0.05 < expected["metrics"]["acc1"] < 1, "the model is neither at chance nor perfect"
    assert found["metrics"] == expected["metrics"]


@pytest.mark.slow
def test_retrieval_is_theirs_to_the_last_digit(case: Case) -> None:
    expected, found = theirs(case, "captions", "zeroshot_retrieval"), ours(case, "captions", "retrieval")
    names = {f"{target}_retrieval_recall@{k}" for target in ("image", "text") for k in KS}
    assert set(expected["metrics"]) == names and 0.02 < expected["metrics"]["image_retrieval_recall@1"] < 0.98
    assert found["metrics"] == expected["metrics"]


@pytest.mark.slow
def test_their_build_takes_our_results(case: Case) -> None:
    tasks = {"classification": "classes", "retrieval": "captions"}
    found = {task: ours(case, dataset, task) for task, dataset in tasks.items()}
    files = [case.root / f"ours-{task}.json" for task in tasks]
    table = case.root / "benchmark.csv"
    done = clip_benchmark_peer.run(["build", *map(str, files), "--output", str(table)])
    assert done.returncode == 0, done.stderr[-2000:]
    with table.open(newline="") as file:
        rows = {row["task"]: row for row in csv.DictReader(file)}
    for task, result in found.items():
        row = rows[f"zeroshot_{task}"]
        assert {name: float(row[name]) for name in result["metrics"]} == result["metrics"]
        assert row["model_fullname"] == f"{case.root / 'ours'} mmrep"
