"""Shards as a folder of CLIP_benchmark's: what is written, what is left out, what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.clip_benchmark import main
from mmrep.data.build import build_index
from mmrep.data.index import Label, Modality
from mmrep.data.writer import write_shard
from tests.tiny import CLASSES, png

MODALITIES = {"image": Modality(("png",), "image"), "text": Modality(("txt",), "text")}


def transparent() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 10, 10, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two pictures of one group, its captions in several samples, and samples that lack something."""
    folder = tmp_path / "shards"
    folder.mkdir()
    samples = [
        {"__key__": "a", "png": png((200, 0, 0)), "txt": "red\nas a rose", "json": {"label": 0, "item": "x"}},
        {"__key__": "b", "png": png((190, 0, 0)), "txt": "crimson", "json": {"label": 0, "item": "x"}},
        {"__key__": "c", "txt": "red\nas a rose", "json": {"label": 0, "item": "x"}},
        {"__key__": "d", "png": transparent(), "txt": "clear", "json": {"label": 3, "item": "y"}},
        {"__key__": "e", "png": png((0, 0, 200)), "json": {"label": 2, "item": "z"}},
        {"__key__": "f", "png": png((0, 200, 0)), "txt": "crimson", "json": {"item": "w"}},
    ]
    write_shard(folder / "test-0.tar", samples)
    build_index(folder, MODALITIES, group_key="item", labels={"label": Label(CLASSES, ["a {c}", "one {c}"])}).save()
    return folder


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]


def run(shards: Path, out: Path, *more: str) -> int:
    return main(["--data", str(shards), "--split", "test", "--out", str(out), *more])


def test_classification(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(shards, out, "--label", "label") == 0 and "4 pictures" in capsys.readouterr().out
    found = members(out / "test" / "0.tar")
    assert {name: data for name, data in found.items() if name.endswith("cls")} == {
        "s0000000.cls": b"0", "s0000001.cls": b"0", "s0000003.cls": b"3", "s0000004.cls": b"2"
    }  # fmt: skip
    assert found["s0000000.png"] == png((200, 0, 0)), "pictures are copied as they are"
    with Image.open(io.BytesIO(found["s0000003.png"])) as clear:
        assert clear.mode == "RGB" and (np.asarray(clear) == 255).all(), "on white, as we see it"
    assert (out / "classnames.txt").read_text().splitlines() == CLASSES
    assert (out / "zeroshot_classification_templates.txt").read_text() == "a {c}\none {c}\n"
    assert (out / "test" / "nshards.txt").read_text() == "1\n" and not (out / "dataset_type.txt").exists()


def test_retrieval_has_a_picture_for_each_group_and_no_caption_twice(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(shards, out, "--retrieval") == 0
    found = members(out / "test" / "0.tar")
    texts = {name: data.decode() for name, data in found.items() if name.endswith("txt")}
    assert texts == {"s0000000.txt": "red as a rose\ncrimson", "s0000003.txt": "clear"}
    assert len(found) == 4 and (out / "dataset_type.txt").read_text() == "retrieval\n"


def test_what_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(shards, out, "--label", "label") == 0
    for more, message in (
        (("--label", "label"), "pass --overwrite"),
        (("--label", "lable"), "no label 'lable'"),
        (("--retrieval", "--overwrite"), "dataset_type.txt of the folder is another"),
        (("--label", "label", "--modality", "img"), "no modality 'img'"),
        (("--retrieval", "--text-modality", "caption"), "no modality 'caption'"),
    ):
        assert run(shards, out, *more) == 2
        assert message in capsys.readouterr().err
    assert run(shards, out, "--label", "label", "--overwrite") == 0
    build_index(shards, MODALITIES, labels={"label": Label(["two\nlines", *CLASSES[1:]])}).save()
    assert run(shards, tmp_path / "other", "--label", "label") == 2
    assert "not one line" in capsys.readouterr().err
