"""index.json: made from shards, read back, and refused when it lies."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmrep.data.build import build_index, label_classes
from mmrep.data.index import Index, Label, Modality
from mmrep.data.member_table import MemberTable
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


def test_an_extension_with_a_plus_is_passed_over(tmp_path: Path) -> None:
    """The + stands between the extensions of a presence; an index with such a one could not be read again."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in ("b.txt", "intro.c++.txt", "intro.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    build_index(tmp_path, {"text": Modality(("txt",), "text")}).save()
    index = Index.load(tmp_path)
    assert index.extensions == ("txt",) and index.shards[0].presence == {"txt": 2}
    assert [fault for _, fault in check_shards(index)] == [None]


def test_half_a_character_in_a_class_comes_back(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "txt": "x", "json": b'{"id": "\\ud83d \xc3\xa9"}'}])
    index = build_index(tmp_path, {"text": Modality(("txt",), "text")}, labels={"id": Label(["\ud83d é"])})
    assert label_classes(index, "id") == ["\ud83d é"]
    index.save()
    assert Index.load(tmp_path).labels == index.labels


def test_a_shard_whose_name_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "txt": "x"}])
    (tmp_path / "train-0.tar").rename(os.fsdecode(os.fsencode(tmp_path) + b"/tr\xe9.tar"))
    with pytest.raises(DataError, match=r"no UTF-8: 'tr\\udce9\.tar' .*rename it"):
        build_index(tmp_path, {"text": Modality(("txt",), "text")})


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
        ("splits", {"train": ["val-000000.tar"] * 2}, r"split 'train' names shards twice: \['val-000000.tar'\]"),
        ("labels", {"label": {"classes": 3}}, "label 'label' has no list"),
        ("group_key", ["label"], "group_key is no text"),
    ],
)
def test_a_lying_index_is_refused(shards: Path, key: str, value: object, message: str) -> None:
    content = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(DataError, match=message):
        Index.load(shards)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("samples", 20.0),
        ("bytes", "x"),
        ("bytes", True),
        ("presence", {"txt": -2, "": 22}),
        ("presence", {"txt": 20.0}),
    ],
)
def test_sizes_and_counts_are_whole_numbers(shards: Path, key: str, value: object) -> None:
    content = json.loads((shards / "index.json").read_text())
    shard = next(shard for shard in content["shards"] if shard["samples"] == 20)
    shard[key] = value
    (shards / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="a size or count is no whole number"):
        Index.load(shards)


def test_a_shard_is_listed_once(shards: Path) -> None:
    index = Index.load(shards)
    index = replace(index, shards=(*index.shards, index.shards[0]), table=MemberTable.concatenate([index.table] * 2))
    index.save()
    with pytest.raises(DataError, match="two shards of one name"):
        Index.load(shards)


def test_a_number_of_thousands_of_digits_is_refused(shards: Path) -> None:
    content = (shards / "index.json").read_text()
    (shards / "index.json").write_text(content.replace('"samples": 20', f'"samples": {"9" * 5000}'))
    with pytest.raises(DataError, match="broken index"):
        Index.load(shards)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key_ends", lambda ends: ends * np.nan),
        ("key_ends", lambda ends: ends.astype("i8") - 1),
        ("present", lambda present: present[:, None]),
        ("present", lambda present: present[0]),
        ("keys", lambda keys: keys[None]),
        ("keys", lambda keys: np.full_like(keys, 0xFF)),
        ("key_ends", lambda ends: np.append(ends[:0:-1], ends[-1])),
        ("key_ends", lambda ends: np.append(np.full_like(ends[1:], 1 << 40), ends[-1])),
    ],
)
def test_broken_arrays_are_refused_when_they_are_loaded_or_read(
    shards: Path, name: str, change: Callable[[Any], np.ndarray]
) -> None:
    path = Index.load(shards).arrays / f"{name}.npy"
    np.save(path, change(np.load(path)))
    content = json.loads((shards / "index.json").read_text())
    content["arrays"][path.name]["bytes"] = path.stat().st_size
    (shards / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"(broken index|do not fit together).*mmrep data index"):
        [Index.load(shards).table.key(row) for row in range(3)]


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
