"""index.json: made from shards, read back, and refused when it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmrep.data.build import build_index, label_classes
from mmrep.data.index import Index, Label, Modality
from mmrep.data.reader import Samples, check_shards
from mmrep.data.writer import write_shard
from mmrep.errors import DataError, SampleError
from tests.tiny import CLASSES, MODALITIES, sample, write_tiny_shards


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def test_round_trip(shards: Path) -> None:
    index = Index.load(shards)
    assert {split: [shard.samples for shard in index.split(split)] for split in index.splits} == {
        "train": [20, 28],
        "val": [20],
        "test": [13, 7],
    }
    assert index.modalities == MODALITIES and index.group_key == "label" and index.labels["label"].classes == CLASSES
    assert set(json.loads((shards / "index.json").read_text())) == {
        *("format", "shards", "modalities", "splits", "group_key", "labels", "provenance", "licences", "fingerprint"),
        *("arrays", "excluded", "extensions", "source"),
    }


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tiny_shards(tmp_path / name, {"train": (5,)})
    for file in ("train-000000.tar", "index.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_splits_by_folder_and_by_name(tmp_path: Path) -> None:
    for name in ("train/0000.tar", "train/0001.tar", "val-00.tar", "7.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, [{"__key__": "a", "txt": "x"}])
    index = build_index(tmp_path, {"text": Modality(("txt",), "text")})
    assert index.splits == {"train": ["7.tar", "train/0000.tar", "train/0001.tar"], "val": ["val-00.tar"]}


def test_classes_come_from_the_samples(shards: Path) -> None:
    assert label_classes(Index.load(shards), "label") == [str(number) for number in range(6)]
    with pytest.raises(DataError, match="field 'nothing'"):
        label_classes(Index.load(shards), "nothing")


def test_missing_things_are_named(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        Index.load(tmp_path / "nowhere")
    (shards / "index.json").unlink()
    with pytest.raises(DataError, match="mmrep data index"):
        Index.load(shards)
    with pytest.raises(DataError, match="no shards"):
        build_index(tmp_path / "nowhere", MODALITIES)
    with pytest.raises(DataError, match="modality 'ecg'"):
        build_index(shards, {"ecg": Modality(("npy",), "array")})


def test_an_index_that_does_not_match_its_shards_is_refused(shards: Path) -> None:
    index = Index.load(shards)
    tar = shards / "test-000000.tar"
    whole = tar.read_bytes()
    tar.unlink()
    with pytest.raises(DataError, match=r"not there .*test-000000\.tar"):
        Samples(index, "test")
    tar.write_bytes(whole + bytes(512))
    with pytest.raises(DataError, match="does not match its index"):
        Samples(index, "test")
    changed = bytearray(whole)
    changed[600] ^= 1  # inside a payload: only the digest can tell
    tar.write_bytes(changed)
    assert [shard.name for shard, fault in check_shards(index) if fault and "sha256" in fault] == ["test-000000.tar"]
    first = min(
        ext for ext in ("flac", "json") if Samples(index, "test").has(0, ext)
    )  # members are sorted by extension
    with pytest.raises(SampleError, match="checksum differs"):
        Samples(index, "test").read(0, first)
    write_shard(tar, [sample(f"k{i}", i) for i in range(3)])
    tar.write_bytes(tar.read_bytes() + bytes(len(whole) - tar.stat().st_size))
    assert [shard.name for shard, fault in check_shards(index) if fault and "sha256" in fault] == ["test-000000.tar"]


def test_a_shard_named_in_braces_must_be_there(shards: Path) -> None:
    (shards / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"no shard .*train-000000\.tar"):
        build_index(f"{shards}/train-{{000000..000001}}.tar", MODALITIES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "other-1", "format 'other-1'"),
        ("fingerprint", "0" * 64, "fingerprint"),
        ("splits", {"train": ["absent.tar"]}, "absent.tar"),
        ("modalities", {"image": {"extensions": ["png"], "kind": "smell"}}, "unknown kind"),
        ("modalities", {"image": {"extensions": ["pkl"], "kind": "image"}}, "no image format"),
        (
            "shards",
            [{"name": "../x.tar", "bytes": 1, "sha256": "", "samples": 1, "presence": {}}],
            "outside its folder",
        ),
        (
            "shards",
            [{"name": "pipe:rm x", "bytes": 1, "sha256": "", "samples": 1, "presence": {}}],
            "outside its folder",
        ),
        ("shards", "nothing", "broken index"),
    ],
)
def test_a_lying_index_is_refused(shards: Path, key: str, value: object, message: str) -> None:
    content = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(DataError, match=message):
        Index.load(shards)


def test_a_truncated_index_is_refused(shards: Path) -> None:
    (shards / "index.json").write_text((shards / "index.json").read_text()[:100])
    with pytest.raises(DataError, match="broken index"):
        Index.load(shards)


def test_unknown_split_names_the_nearest(shards: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'train'"):
        Index.load(shards).split("trian")


def test_label_prompts_default_to_the_class() -> None:
    assert Label(["a"]).templates == ["{c}"]


@pytest.mark.parametrize("key", ["", "a.b", "/a", "../a"])
def test_writer_refuses_keys_that_a_reader_would_take_apart(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="key"):
        write_shard(tmp_path / "a.tar", [{"__key__": key, "txt": "x"}])
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_a_repeated_key_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        write_shard(tmp_path / "a.tar", [{"__key__": "a", "txt": "x"}, {"__key__": "a", "txt": "y"}])
    assert list(tmp_path.iterdir()) == []
