"""COCO's and Karpathy's layouts: counts, contents, groups, what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.coco import main
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.retrieval import Direction, rank_queries
from mmrep.stable_hash import stable_hash
from tests.data_prep.releases import jpeg, put, write_coco, write_karpathy
from tests.tiny import file_bytes


def records(samples: Samples) -> list[dict[str, object]]:
    return [json.loads(samples.read(number, "json")) for number in range(len(samples))]


def test_every_caption_trains_with_its_picture_and_pictures_are_stored_once_elsewhere(tmp_path: Path) -> None:
    root, out = write_coco(tmp_path / "coco"), tmp_path / "out"
    assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    index = Index.load(out)
    train, val = Samples(index, "train"), Samples(index, "val")
    assert (len(train), len(val)) == (6 * 5 + 2, 4 * 5 + 1)
    assert sum(train.has(n, "jpg") for n in range(len(train))) == len(train)
    assert sum(val.has(n, "jpg") for n in range(len(val))) == 4
    assert index.group_key == "image_id" and set(index.licences) == {"annotations", "pictures"}
    # Contents are exact, captions in the order of their numbers although the file has them reversed.
    assert train.read(5, "jpg") == jpeg(1) and train.read(6, "txt") == b"A picture 1, told 1."
    assert records(val)[0] == {"image_id": 106, "file": "val2017/000000000006.jpg", "caption": 0}
    assert not list(csv.reader((out / "rejects.csv").open()))[1:]


def test_groups_give_the_positives_of_the_field(tmp_path: Path) -> None:
    """A model that is right by picture has recall 1 in both directions: 21 captions ask, 4 pictures ask, 4 are found."""
    main(["--root", str(write_coco(tmp_path / "coco")), "--out", str(tmp_path / "out"), "--workers", "1"])
    samples = Samples(Index.load(tmp_path / "out"), "val")
    groups = torch.tensor([stable_hash(str(record["image_id"])) for record in records(samples)])
    rows = torch.nn.functional.one_hot(groups.unique(return_inverse=True)[1], 4).float()
    there = {
        name: torch.tensor([samples.has(n, e) for n in range(len(samples))]) for name, e in [("i", "jpg"), ("t", "txt")]
    }

    class Cosine:
        def score(self, *, target: str, candidates: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
            return next(iter(given.values())) @ candidates.T

    ranked = rank_queries(Embeddings({"i": rows, "t": rows}, there, {"@group": groups}), Cosine())
    to_picture, to_text = ranked[Direction(("t",), "i")], ranked[Direction(("i",), "t")]
    assert (len(to_picture.ranks), to_picture.candidates, len(to_text.ranks), to_text.candidates) == (21, 4, 4, 21)
    assert set(to_picture.ranks) == set(to_text.ranks) == {1}


def test_karpathy_puts_restval_into_training_and_finds_pictures_by_either_name(tmp_path: Path) -> None:
    file = write_karpathy(tmp_path / "coco")
    words = [
        "--root",
        str(tmp_path / "coco"),
        "--karpathy",
        str(file),
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    assert main([*words, "--train-captions", "2"]) == 0
    index = Index.load(tmp_path / "out")
    assert {name: len(Samples(index, name)) for name in index.splits} == {"train": 3 * 2, "val": 5, "test": 2 * 5}
    train, test = Samples(index, "train"), Samples(index, "test")
    assert [record["split"] for record in records(train)] == ["train"] * 2 + ["restval"] * 2 + ["train"] * 2
    assert records(test)[0]["image_id"] == 503 and test.read(0, "jpg") == jpeg(3)


def test_flickr_comes_by_the_same_file(tmp_path: Path) -> None:
    file = write_karpathy(tmp_path / "flickr", flickr=True)
    out = tmp_path / "out"
    assert main(["--root", str(tmp_path / "flickr"), "--karpathy", str(file), "--out", str(out), "--workers", "1"]) == 0
    test = Samples(Index.load(out), "test")
    assert len(test) == 10 and records(test)[5]["image_id"] == 4 and test.read(5, "jpg") == jpeg(4)


def test_missing_and_broken_pictures_are_listed_and_end_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_coco(tmp_path / "coco"), tmp_path / "out"
    (root / "train2017" / "000000000001.jpg").unlink()
    put(root / "val2017" / "000000000007.jpg", jpeg(7)[:100])
    assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    index = Index.load(out)
    assert (len(Samples(index, "train")), len(Samples(index, "val"))) == (32 - 5, 21 - 5)
    header, *rejects = csv.reader((out / "rejects.csv").open())
    assert header == ["split", "entry", "where", "reason"]
    assert [row[:2] for row in rejects] == [["train", "1"], ["val", "1"]] and rejects[0][3] == "no such file"
    said = capsys.readouterr().out
    assert "train: 5 entries, 27 samples, 27 image, 27 text, 1 rejects" in said and "listed in rejects.csv" in said


def test_pictures_shrink_on_demand(tmp_path: Path) -> None:
    words = ["--root", str(write_coco(tmp_path / "coco")), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*words, "--image-size", "8", "--limit", "2"]) == 0
    samples = Samples(Index.load(tmp_path / "out"), "val")
    assert Image.open(io.BytesIO(samples.read(0, "jpg"))).size == (10, 8) and len(samples) == 5 + 5


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "annotations").rename(root / "labels"), "not the layout of COCO captions: none of"),
        (lambda root: put(root / "annotations" / "captions_train2017.json", "{"), "no JSON"),
        (lambda root: put(root / "annotations" / "captions_val2017.json", '{"images": []}'), "not the form of COCO's"),
        (lambda root: (root / "annotations" / "captions_val2017.json").unlink(), "no such file"),
    ],
    ids=["folder", "json", "form", "half"],
)
def test_wrong_layout_is_one_line(
    break_it: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_coco(tmp_path / "coco")
    break_it(root)  # type: ignore[operator]
    assert main(["--root", str(root), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_name_cannot_lead_out_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_coco(tmp_path / "coco")
    file = root / "annotations" / "captions_val2017.json"
    file.write_text(file.read_text().replace("000000000006.jpg", "../../secret.jpg"))
    put(tmp_path / "secret.jpg", jpeg(0))
    assert main(["--root", str(root), "--out", str(tmp_path / "out")]) == 2
    assert "outside the folder" in capsys.readouterr().err


def test_processes_change_no_byte(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    for workers in ("1", "3"):
        words = ["--root", str(root), "--out", str(tmp_path / workers), "--workers", workers, "--shard-entries", "2"]
        assert main(words) == 0
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "3")
    assert len(list((tmp_path / "3").glob("train-*.tar"))) == 3


@pytest.mark.parametrize("number", ['"a number"', "1e999", "[]"])
def test_karpathy_with_an_odd_number_is_one_line(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_karpathy(tmp_path)
    file.write_text(file.read_text().replace('"cocoid": 502', f'"cocoid": {number}'))
    assert main(["--root", str(tmp_path), "--karpathy", str(file), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "not the form of Karpathy's splits" in error and error.count("\n") == 1
