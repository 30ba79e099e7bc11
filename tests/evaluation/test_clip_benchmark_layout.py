"""CLIP_benchmark's folders: written from our shards, read again, and what is refused of foreign ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.clip_benchmark import convert
from mmrep.batch import Batch
from mmrep.cli import main
from mmrep.data.dataset import GROUP
from mmrep.data.index import Index
from mmrep.data.writer import npy_bytes, write_shard
from mmrep.encoders import ConvImageEncoder, NgramTextEncoder
from mmrep.errors import ConfigError, MmrepError
from mmrep.evaluation.clip_benchmark import (
    LABEL,
    MOST_CAPTIONS,
    ClipBenchmark,
    ClipBenchmarkDataset,
    clip_benchmark_loader,
    target_label,
)
from mmrep.evaluation.sources import class_task, open_source, retrieval_encoders
from mmrep.evaluation.zero_shot import Split, zero_shot_classification, zero_shot_retrieval
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from tests.evaluation.pictures import CLASSES, TEMPLATES, captions, picture, write_pictures

COUNT = 26
FILES_OF_LINES = {"few": "a" + "\n" * MOST_CAPTIONS, "many": "a" + "\n" * MOST_CAPTIONS + "b"}
FIGURES = ("recall@1", "recall@5", "recall@10", "mrr", "median_rank", "queries", "candidates", "chance_recall@1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of pictures as shards, for classification, and for retrieval; and a model."""
    root = tmp_path_factory.mktemp("layouts")
    write_pictures(root / "shards", COUNT)
    assert convert(root / "shards", "test", root / "classes", label="label") == COUNT
    assert convert(root / "shards", "test", root / "captions") == COUNT
    model().save_pretrained(root / "model")
    return root


def model() -> MultimodalModel:
    torch.manual_seed(0)
    encoders = {"image": ConvImageEncoder(8, image_size=16, width=8), "text": NgramTextEncoder(8, width=16, buckets=99)}
    return MultimodalModel(encoders, PairwiseCLIPLoss()).eval()


def dataset(folder: Path, size: int = 5, names: tuple[str, ...] = ("image",)) -> ClipBenchmarkDataset:
    encoders = {name: encoder for name, encoder in model().by_modality.items() if name in names}
    return ClipBenchmarkDataset(ClipBenchmark.load(folder), "test", encoders, size)


def batches(folder: Path, **options: Any) -> list[Batch]:
    return list(clip_benchmark_loader(dataset(folder, **options)))


def test_what_is_written_is_read_again(root: Path) -> None:
    source = open_source(root / "classes")
    assert isinstance(source, ClipBenchmark) and (source.classes, source.templates) == (CLASSES, TEMPLATES)
    assert isinstance(open_source(root / "shards"), Index)
    found = batches(root / "classes")
    labels = torch.cat([batch.labels[LABEL] for batch in found])
    assert labels.tolist() == [n % len(CLASSES) for n in range(COUNT)] + [-1] * (-COUNT % 5)
    assert [len(batch) for batch in found] == [5] * 6 and sum(bool(key) for b in found for key in b.keys) == COUNT


def test_captions_beyond_the_first_are_rows_without_a_picture(root: Path) -> None:
    found = batches(root / "captions", names=("image", "text"))
    keys = [key for batch in found for key in batch.keys if key]
    present = {name: torch.cat([b.present[name] for b in found])[: len(keys)] for name in ("image", "text")}
    group = torch.cat([batch.labels[GROUP] for batch in found])
    assert len(keys) == sum(len(captions(n)) for n in range(COUNT)) and bool(present["text"].all())
    assert int(present["image"].sum()) == COUNT
    assert group[: len(keys)].bincount().tolist() == [len(captions(n)) for n in range(COUNT)]


def test_both_layouts_give_the_same_figures(root: Path) -> None:
    """The shards hold the same captions as samples of one group: the layout changes nothing."""
    both = [zero_shot_retrieval(model(), Split(open_source(root / name), "test", 7)) for name in ("shards", "captions")]
    for direction, figures in both[0][0].items():
        assert {n: figures[n] for n in FIGURES} == {n: both[1][0][direction][n] for n in FIGURES}, direction
    found = []
    for name in ("shards", "classes"):
        source = open_source(root / name)
        found.append(zero_shot_classification(model(), Split(source, "test", 7), class_task(source)))
    extra = sum(len(captions(n)) - 1 for n in range(COUNT))  # samples of the shards that are a caption alone
    assert found[0] == found[1] | {"absent": extra} and found[1]["n"] == COUNT


def test_every_row_comes_once_on_any_number_of_ranks_and_workers(root: Path) -> None:
    alone = sorted(key for batch in batches(root / "captions", names=("image", "text")) for key in batch.keys if key)
    for world, workers in ((2, 0), (3, 0), (1, 1)):
        parts = [
            clip_benchmark_loader(
                dataset(root / "captions", 6, ("image", "text")), num_workers=workers, rank=rank, world=world
            )
            for rank in range(world)
        ]
        assert sorted(key for part in parts for batch in part for key in batch.keys if key) == alone


def test_several_classes_a_picture(tmp_path: Path) -> None:
    targets = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]])
    write_set(tmp_path, [{"npy": npy_bytes(row)} for row in targets], "multilabel", "a\nb\nc\n")
    found = batches(tmp_path, size=4)[0]
    assert torch.stack([found.labels[target_label(n)] for n in range(3)], dim=1).tolist() == targets.tolist()
    source = open_source(tmp_path)
    figures = zero_shot_classification(model(), Split(source, "test"), class_task(source, language="de"))
    assert 0 < figures["mean_average_precision"] <= 1 and figures["n"] == 4 and "acc1" not in figures


def write_set(folder: Path, members: list[dict[str, Any]], kind: str = "", classes: str = "cat\ndog\n") -> Path:
    (folder / "test").mkdir(parents=True)
    samples = [{"__key__": f"s{n}", "png": picture(n), **more} for n, more in enumerate(members)]
    write_shard(folder / "test" / "0.tar", [{k: v for k, v in sample.items() if v is not None} for sample in samples])
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text(classes)
    if kind:
        (folder / "dataset_type.txt").write_text(kind)
    return folder


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        ({"cls": "2"}, "", "'2' is no class from 0 to 1.*s0"),
        ({"cls": "x"}, "", "'x' is no class"),
        ({"cls": "0" * 99}, "", "99 bytes, more than 64"),
        ({"txt": "a"}, "", "without .cls"),
        ({"png": None, "cls": "0"}, "", "without .webp or .png"),
        ({"png": b"\x89PNG broken", "cls": "0"}, "", "cannot be decoded"),
        ({"cls": "0", "pkl": b""}, "", "unsafe format"),
        ({"npy": npy_bytes(np.array([1.0, 0.5]))}, "multilabel", "no 2 zeros and ones"),
        ({"npy": npy_bytes(np.array([1, 0, 0]))}, "multilabel", "no 2 zeros and ones"),
        ({"npy": npy_bytes(np.array([0, 1]))[:-1]}, "multilabel", "array .npy"),
        ({"cls": "0"}, "video", "of type 'video'"),
        ({"cls": "0"}, "[1]", "of type '1'.*choose from: classification"),
    ],
)
def test_foreign_folders_are_not_trusted(tmp_path: Path, members: dict[str, Any], kind: str, message: str) -> None:
    write_set(tmp_path / "set", [members], kind)
    with pytest.raises(MmrepError, match=message):
        batches(tmp_path / "set")


def test_captions_of_a_picture_have_a_bound(tmp_path: Path) -> None:
    """An empty line is a caption, as in CLIP_benchmark; a small file of them is no batch of a gigabyte."""
    few, many = (write_set(tmp_path / name, [{"txt": text}], "retrieval") for name, text in FILES_OF_LINES.items())
    (batch,) = batches(few, size=1, names=("image", "text"))
    assert len(batch) == MOST_CAPTIONS and int(batch.present["text"].sum()) == MOST_CAPTIONS
    with pytest.raises(MmrepError, match=rf"{MOST_CAPTIONS + 1} captions of a picture, more than 1000.*0\.tar:s0"):
        batches(many, size=1, names=("image", "text"))


def test_missing_splits_and_shards(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set", [{"cls": "0"}])
    source = ClipBenchmark.load(folder)
    with pytest.raises(MmrepError, match=r"no split 'tset'.*'test'"):
        source.shards("tset")
    for content, message in (("2", "1 of 2 shards are missing.*1.tar"), ("many", "'many' is no number"), ("0", "'0'")):
        (folder / "test" / "nshards.txt").write_text(content)
        with pytest.raises(MmrepError, match=message):
            source.shards("test")


def test_the_task_must_be_that_of_the_folder(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"type retrieval.*eval retrieval"):
        class_task(open_source(root / "captions"))
    with pytest.raises(ConfigError, match=r"type classification.*eval classification"):
        retrieval_encoders(open_source(root / "classes"), model().by_modality)
    with pytest.raises(ConfigError, match=r"no modality 'picture'"):
        retrieval_encoders(open_source(root / "captions"), model().by_modality, image="picture")


def test_class_names_and_templates_of_files(root: Path, tmp_path: Path) -> None:
    source = open_source(root / "shards")
    (tmp_path / "names.txt").write_text("\n".join(f"Klasse {n}" for n in range(12)))
    task = class_task(source, classnames=tmp_path / "names.txt", language="de")
    assert task.prompts[1][0] == "ein Foto: Klasse 1." and task.labels == ["label"] and task.language == "de"
    assert class_task(source).prompts[0] == [t.replace("{c}", CLASSES[0]) for t in TEMPLATES]
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"2 names for 12 classes"):
        class_task(source, classnames=tmp_path / "names.txt")


def test_a_language_that_a_file_lacks_is_not_taken_for_english(root: Path, tmp_path: Path) -> None:
    source = open_source(root / "shards")
    (tmp_path / "t.json").write_text(json.dumps({"en": ["a photo of {c}"], "de_": ["ein Foto: {c}"]}))
    (tmp_path / "c.json").write_text(json.dumps({"en": [f"class {n}" for n in range(12)]}))
    assert class_task(source, templates=tmp_path / "t.json").language == "en"
    assert class_task(source, templates=tmp_path / "t.json", language="en").prompts[0][0].startswith("a photo of")
    with pytest.raises(ConfigError, match=r"neither all classes nor 'de' nor 'label'.*did you mean 'de_'"):
        class_task(source, templates=tmp_path / "t.json", language="de")
    assert class_task(source, classnames=tmp_path / "c.json").prompts[3][0].count("class 3")
    with pytest.raises(ConfigError, match=r"neither all classes nor 'de' nor 'label'"):
        class_task(source, classnames=tmp_path / "c.json", language="de")


def evaluate(task: str, root: Path, data: str, out: Path, *more: str) -> int:
    arguments = ["eval", task, "--checkpoint", str(root / "model"), "--data", str(root / data), "--device", "cpu"]
    return main([*arguments, "--out", str(out), *more])


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    more = ("--out-clip-benchmark", str(theirs), "--language", "fr")
    assert evaluate("classification", root, "classes", out, *more) == 0
    found, copied = json.loads(out.read_text()), json.loads(theirs.read_text())
    assert found["task"] == "classification" and found["language"] == copied["language"] == "fr"
    assert copied["metrics"] == {name: found[name] for name in ("acc1", "acc5", "mean_per_class_recall")}
    assert "top-1 %" in capsys.readouterr().out and found["n"] == COUNT and found["prompts"] == 36
    assert evaluate("classification", root, "classes", out, *more) == 2
    assert "the result exists" in capsys.readouterr().err
    assert evaluate("retrieval", root, "captions", out, "--overwrite", "--direction", "text->image") == 0
    assert list(json.loads(out.read_text())["directions"]) == ["text->image"]
    for wrong, message in (
        (("--modality", "imgae"), "no modality 'imgae'"),
        (("--text-modality", "image"), "cannot take the prompts"),
        (("--language", "xx"), "no templates for the language"),
        (("--split", "tset"), "no split 'tset'"),
        (("--batch-size", "0"), "--batch-size 0"),
    ):
        assert evaluate("classification", root, "classes", tmp_path / "none.json", *wrong) == 2
        assert message in capsys.readouterr().err
