"""Clotho's layout: counts, contents, groups, licences, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep import clotho
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from tests.data_prep.releases import wav, write_clotho


def record(samples: Samples, number: int) -> dict[str, object]:
    content: dict[str, object] = json.loads(samples.read(number, "json"))
    return content


def test_clotho_has_three_splits_with_five_captions_a_clip(tmp_path: Path) -> None:
    root, out = write_clotho(tmp_path / "clotho"), tmp_path / "out"
    assert clotho.main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    index = Index.load(out)
    splits = {name: Samples(index, name) for name in ("train", "val", "test")}
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 20, "val": 20, "test": 20}
    clips = {name: sum(samples.has(n, "wav") for n in range(20)) for name, samples in splits.items()}
    assert clips == {"train": 20, "val": 4, "test": 4}
    assert splits["test"].read(5, "wav") == wav(9) and splits["test"].read(7, "txt") == b"evaluation clip 1, told 2"
    groups = [record(splits["val"], n)["clip"] for n in range(20)]
    assert groups == [f"validation/Clip 1{n // 5}, a door.wav" for n in range(20)] and index.group_key == "clip"


def test_clotho_says_whose_clip_it_is(tmp_path: Path) -> None:
    """The table of the metadata is Latin-1 in the release."""
    clotho.main(["--root", str(write_clotho(tmp_path / "clotho")), "--out", str(tmp_path / "out"), "--workers", "1"])
    samples = Samples(Index.load(tmp_path / "out"), "train")
    facts = record(samples, 0)
    assert (facts["manufacturer"], facts["license"], facts["keywords"]) == ("José", "CC BY 3.0", "door;wood")


def test_clotho_of_version_1_has_no_validation(tmp_path: Path) -> None:
    root = write_clotho(tmp_path / "clotho")
    (root / "clotho_captions_validation.csv").unlink()
    assert clotho.main(["--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert set(Index.load(tmp_path / "out").splits) == {"train", "test"}


def test_clotho_in_the_wrong_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_clotho(tmp_path / "clotho")
    assert clotho.main(["--root", str(tmp_path / "clotho" / "development"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "not the layout of Clotho: none of clotho_captions_development.csv" in error and error.count("\n") == 1
