"""`mmrep data index|check|stats` as a user types them, on shards of every make."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmrep.cli import main
from mmrep.data import scan
from mmrep.data.build import build_index
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.data.writer import write_shard
from tests.data.server import served
from tests.tiny import MODALITIES, png, write_tiny_shards

TINY = ["--modality", "image=png", "--modality", "text=txt", "--modality", "audio=flac"]
TEXT = ["--modality", "text=txt"]
Capture = pytest.CaptureFixture[str]


def index(*words: str | Path) -> int:
    return main(["data", "index", *map(str, words)])


def check(place: str | Path) -> int:
    return main(["data", "check", str(place)])


def one_line(capsys: Capture) -> str:
    """The last error, which must be one line."""
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("mmrep: error: "), error
    return error[0]


def write_texts(folder: Path, *names: str, count: int = 3) -> Path:
    """Shards of a few texts, with an odd number and a field "kind" in the json."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        texts = [{"__key__": f"{n:03d}", "txt": f"{name} {n}", "json": {"kind": n % 2}} for n in range(count)]
        write_shard(folder / name, texts)
    return folder


def read_all(place: Path, extension: str = "txt") -> dict[str, bytes]:
    """The members with an extension of all samples of an index, by shard and key."""
    found = {}
    loaded = Index.load(place)
    for split in loaded.splits:
        samples = Samples(loaded, split)
        for number in range(len(samples)):
            if samples.has(number, extension):
                found[samples.where(number)] = samples.read(number, extension)
    return found


def read_keys(place: Path, extension: str = "txt") -> dict[str, bytes]:
    return {where.partition(":")[2]: data for where, data in read_all(place, extension).items()}


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# --- index: places ---


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["train-000000.tar", "train-000001.tar", "val-000000.tar"]),
        ("train-{000000..000001}.tar", ["train-000000.tar", "train-000001.tar"]),
        ("{train,val}-000000.tar", ["train-000000.tar", "val-000000.tar"]),
        ("*-000000.tar", ["train-000000.tar", "val-000000.tar"]),
        ("train-00000?.tar", ["train-000000.tar", "train-000001.tar"]),
    ],
)
def test_a_folder_or_a_pattern_indexed_elsewhere(
    pattern: str, names: list[str], tmp_path: Path, capsys: Capture
) -> None:
    shards, out = tmp_path / "shards", tmp_path / "deep" / "index"
    write_tiny_shards(shards, {"train": (9, 5), "val": (4,)})
    (shards / "index.json").unlink()
    before = {path: path.read_bytes() for path in shards.glob("*.tar")}
    files = sorted(shards.iterdir())
    assert index(shards / pattern, "--out", out, *TINY, "--workers", "1") == 0
    loaded = Index.load(out)
    assert [shard.name for shard in loaded.shards] == names and loaded.root == str(shards)
    assert {path.name for path in out.iterdir()} == {"index.json", loaded.arrays.name}
    assert sorted(shards.iterdir()) == files and all(path.read_bytes() == data for path, data in before.items())
    assert check(out) == 0
    assert f"{len(names)} shards are as the index says" in capsys.readouterr().out
    with tarfile.open(shards / "train-000000.tar") as tar:
        file = tar.extractfile("train-0-0002.txt")
        assert file is not None and read_all(out)["train-000000.tar:train-0-0002"] == file.read()


def test_a_pattern_without_out_writes_beside_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path, "train-0.tar", "train-1.tar")
    monkeypatch.chdir(tmp_path)
    assert index("train-*.tar", *TEXT) == 0
    assert Index.load(tmp_path).source is None and len(read_all(tmp_path)) == 6
    assert index("train-{0..0}.tar") == 0  # finds the index beside the shards that the pattern names
    assert [shard.name for shard in Index.load(tmp_path).shards] == ["train-0.tar"]


def test_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Spy(ProcessPoolExecutor):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    write_tiny_shards(tmp_path, {"train": (9, 5, 1), "val": (4,)})
    paths = sorted(tmp_path.glob("*.tar"))
    serial = list(scan.scan_shards(paths))
    assert index(tmp_path, "--workers", "1") == 0
    one = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(scan, "WORTH_A_PROCESS", 0)
    monkeypatch.setattr(scan, "ProcessPoolExecutor", Spy)
    done: list[int] = []
    assert list(scan.scan_shards(paths, workers=2)) == serial
    assert index(tmp_path, "--workers", "2") == 0
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == one
    build_index(tmp_path, MODALITIES, workers=2, progress=done.append)
    assert len(started) == 3 and done == [1] * len(paths)


def test_a_broken_shard_found_by_a_process_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    write_texts(tmp_path, "train-0.tar", "train-1.tar")
    (tmp_path / "train-1.tar").write_bytes((tmp_path / "train-1.tar").read_bytes()[:1000])
    monkeypatch.setattr(scan, "WORTH_A_PROCESS", 0)
    assert index(tmp_path, *TEXT, "--workers", "2") == 2
    assert "train-1.tar" in one_line(capsys) and not (tmp_path / "index.json").exists()


# --- index: makes of shards ---


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    """00000.tar with running numbers as keys, and tables beside it."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for number in range(4):
                key = f"{shard:05d}{number:04d}"
                add_file(tar, f"{key}.jpg", jpeg(number))
                if number != 2:
                    add_file(tar, f"{key}.txt", f"caption {key}".encode())
                add_file(tar, f"{key}.json", json.dumps({"key": key, "status": "success"}).encode())
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 4}')
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1 not for us")
    assert index(tmp_path, "--modality", "image=jpg,png,webp", *TEXT) == 0 and check(tmp_path) == 0
    loaded = Index.load(tmp_path)
    assert loaded.splits == {"train": ["00000.tar", "00001.tar"]}
    assert loaded.shards[0].presence == {"jpg+json+txt": 3, "jpg+json": 1}
    texts = read_keys(tmp_path)
    assert texts["000010003"] == b"caption 000010003" and len(texts) == 6
    picture = decode("image", "jpg", read_keys(tmp_path, "jpg")["000000001"], "")
    assert picture.size == (8, 8) and np.abs(np.asarray(picture)[0, 0] - [1, 90, 200]).max() < 5


def test_what_the_tar_command_writes(tmp_path: Path) -> None:
    source = tmp_path / "files"
    (source / "birds").mkdir(parents=True)
    for name in ("one", "two"):
        (source / "birds" / f"{name}.png").write_bytes(png((200, 10, 10)))
        (source / "birds" / f"{name}.txt").write_text(f"bird {name}")
    (source / "README").write_text("no sample")
    shards = tmp_path / "shards"
    shards.mkdir()
    subprocess.run(["tar", "--sort=name", "-cf", shards / "train-0.tar", "-C", source, "."], check=True)
    assert index(shards, *TEXT, "--modality", "image=png") == 0 and check(shards) == 0
    assert read_keys(shards) == {"birds/one": b"bird one", "birds/two": b"bird two"}
    assert set(read_keys(shards, "png").values()) == {png((200, 10, 10))}


KEYS = ["00", "élan/ключ", "鳥の写真", "🐦", "long/" * 30 + "x" * 90, "y" * 180]


def test_what_webdataset_writes_and_reads(tmp_path: Path) -> None:
    """Names that are long or not ASCII take pax headers."""
    import webdataset

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir(), ours.mkdir()
    samples = [{"__key__": key, "txt": f"text of {key}", "json": {"n": n}} for n, key in enumerate(KEYS)]
    with webdataset.ShardWriter(str(theirs / "train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    write_shard(ours / "train-000000.tar", samples)
    for folder in (theirs, ours):
        assert index(folder, *TEXT) == 0 and check(folder) == 0
        assert read_keys(folder) == {key: f"text of {key}".encode() for key in KEYS}
    read = list(webdataset.WebDataset(str(ours / "train-000000.tar"), shardshuffle=False).decode())
    assert {sample["__key__"]: (sample["txt"], sample["json"]) for sample in read} == {
        key: (f"text of {key}", {"n": n}) for n, key in enumerate(KEYS)
    }


# --- index: made anew ---


@pytest.fixture
def indexed(tmp_path: Path, capsys: Capture) -> Path:
    """Shards 0 to 3 in splits that their names do not say, with labels and a group key, of a maker who says more."""
    folder = write_texts(tmp_path / "shards", "train-0.tar", "train-1.tar", "train-2.tar", "train-3.tar")
    assert index(folder, *TEXT, "--group-key", "kind", "--label-key", "kind") == 0
    content = json.loads((folder / "index.json").read_text())
    content["splits"] = {"train": ["train-2.tar", "train-0.tar"], "held_out": ["train-1.tar", "train-3.tar"]}
    content["labels"]["kind"]["templates"] = ["a {c}"]
    content |= {"provenance": {"maker": "us"}, "licences": {"all": "CC0"}}
    (folder / "index.json").write_text(json.dumps(content))
    capsys.readouterr()
    return folder


def as_format_1(folder: Path) -> None:
    """The index as the first version wrote it."""
    content = json.loads((folder / "index.json").read_text()) | {"format": "mmrep-index-1"}
    for later in ("source", "extensions", "excluded", "arrays"):
        del content[later]
    for shard in content["shards"]:
        del shard["presence"]
    (folder / "index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("older", [False, True])
def test_made_anew_it_keeps_what_was_said(indexed: Path, older: bool, capsys: Capture) -> None:
    before = Index.load(indexed)
    if older:
        as_format_1(indexed)
        assert check(indexed) == 2
        assert f"mmrep data index {indexed} keeps its modalities, splits and labels" in one_line(capsys)
    assert index(indexed) == 0
    after = Index.load(indexed)
    assert after == before and after.labels["kind"].templates == ["a {c}"] and after.licences == {"all": "CC0"}
    assert capsys.readouterr().out.count("\n") == 1 and check(indexed) == 0


@pytest.mark.parametrize("older", [False, True])
def test_new_and_lost_shards(indexed: Path, older: bool, capsys: Capture) -> None:
    """A new shard is where its name says, a lost one nowhere, and each is told."""
    if older:
        as_format_1(indexed)
    write_texts(indexed, "train-4.tar", "val-0.tar", "val-1.tar", "val-2.tar", "val-3.tar")
    for lost in ("train-0.tar", "train-1.tar", "train-3.tar"):
        (indexed / lost).unlink()
    assert index(indexed) == 0
    assert Index.load(indexed).splits == {
        "train": ["train-2.tar", "train-4.tar"],
        "val": [f"val-{n}.tar" for n in range(4)],
    }
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "new in split train: train-4.tar",
        "new in split val: val-0.tar, val-1.tar, val-2.tar and 1 more",
        "not there any more: train-0.tar, train-1.tar, train-3.tar",
        "splits of which nothing is left: held_out",
    ]
    assert check(indexed) == 0 and len(read_all(indexed)) == 18


def test_an_index_elsewhere_keeps_what_the_one_beside_the_shards_says(indexed: Path, tmp_path: Path) -> None:
    assert index(indexed, "--out", tmp_path / "out") == 0
    assert Index.load(tmp_path / "out").splits == Index.load(indexed).splits
    assert index(indexed, "--out", tmp_path / "out", *TEXT) == 0  # whoever names modalities begins afresh
    fresh = Index.load(tmp_path / "out")
    assert list(fresh.splits) == ["train"] and fresh.group_key is None and not fresh.labels and not fresh.licences


def test_classes_are_counted_again_and_keep_their_templates(indexed: Path) -> None:
    write_shard(indexed / "train-9.tar", [{"__key__": "a", "txt": "x", "json": {"kind": "new", "group": 1}}])
    assert index(indexed) == 0
    assert Index.load(indexed).labels["kind"].classes == ["0", "1"]
    assert index(indexed, "--label-key", "kind", "--group-key", "group") == 0
    label = Index.load(indexed).labels["kind"]
    assert label.classes == ["0", "1", "new"] and label.templates == ["a {c}"]
    assert Index.load(indexed).group_key == "group"


# --- index: samples left out ---


def write_quarantine(path: Path, shards: Path, *samples: tuple[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["shard", "sha256", "key", "modality", "reason", "detail"])
        for shard, key in samples:
            there = (shards / shard).is_file()
            digest = hashlib.sha256((shards / shard).read_bytes()).hexdigest() if there else "0" * 64
            writer.writerow([shard, digest, key, "text", "undecodable", "a, b"])
    return path


def test_quarantined_samples_are_left_out(indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    before, everything = Index.load(indexed), read_all(indexed)
    listed = write_quarantine(
        tmp_path / "q.csv", indexed, ("train-1.tar", "001"), ("train-2.tar", "000"), ("else-0.tar", "001")
    )
    assert index(indexed, "--exclude", listed) == 0
    assert "10 samples in 4 shards" in (out := capsys.readouterr().out) and "without 2 excluded" in out
    after, out_of = Index.load(indexed), {"train-1.tar:001", "train-2.tar:000"}
    assert after.fingerprint != before.fingerprint and set(after.excluded) == out_of
    assert read_all(indexed) == {where: text for where, text in everything.items() if where not in out_of}
    assert check(indexed) == 0
    assert index(indexed) == 0 and Index.load(indexed) == after  # it is kept
    more = write_quarantine(tmp_path / "more.csv", indexed, ("train-1.tar", "002"))
    assert index(indexed, "--exclude", more) == 0 and len(Index.load(indexed).excluded) == 3
    (indexed / "train-1.tar").unlink()
    assert index(indexed) == 0 and Index.load(indexed).excluded == ("train-2.tar:000",)
    assert index(indexed, *TEXT) == 0 and not Index.load(indexed).excluded


def test_a_quarantine_that_is_none_and_one_of_other_shards(indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for wrong in (tmp_path / "absent.csv", tmp_path / "other.csv"):
        assert index(indexed, "--exclude", wrong) == 2
        assert "no quarantine file" in one_line(capsys)
    elsewhere = write_quarantine(tmp_path / "q.csv", tmp_path, ("train-1.tar", "001"))  # of another dataset of a blend
    assert index(indexed, "--exclude", elsewhere) == 0 and not Index.load(indexed).excluded
    assert f"no sample of {elsewhere} is in these shards" in capsys.readouterr().out


# --- index: mistakes ---


def gzipped(folder: Path) -> list[str]:
    (folder / "a.tar").write_bytes(gzip.compress((write_texts(folder, "b.tar") / "b.tar").read_bytes()))
    (folder / "b.tar").unlink()
    return [str(folder), *TEXT]


def pickled(folder: Path) -> list[str]:
    with tarfile.open(folder / "a.tar", "w") as tar:
        add_file(tar, "000.txt", b"x")
        add_file(tar, "000.pkl", b"cos\nsystem\n(S'true'\ntR.")
    return [str(folder), *TEXT]


def texts(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: [str(write_texts(folder, "a-0.tar")), *words]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (gzipped, "a.tar"),
        (pickled, "unsafe format"),
        (lambda folder: [str(folder), *TEXT], "no shards"),
        (lambda folder: [str(folder / "nowhere"), *TEXT], "no shards"),
        (lambda folder: [str(folder / "x-{0..9}.tar"), *TEXT], "no shards"),
        (lambda folder: ["pipe:cat x", *TEXT], "'pipe:' is no place"),
        (lambda folder: ["file:///x", *TEXT], "'file:' is no place"),
        (lambda folder: ["http://localhost/x", "--out", str(folder), *TEXT], "not listed"),
        (lambda folder: ["http://localhost/x-0.tar", *TEXT], "--out"),
        (texts(), "no modality is named"),
        (texts("--modality", "text=exe"), "no decoder for '.exe'"),
        (texts("--modality", "text=tx"), "did you mean 'txt'?"),
        (texts("--modality", "both=txt,png"), "is no text format"),
        (texts("--modality", "text"), "image=jpg,png"),
        (texts("--modality", "=txt"), "image=jpg,png"),
        (texts(*TEXT, *TEXT), "named twice"),
        (texts("--modality", "sound=flac"), "modality 'sound'"),
        (texts(*TEXT, "--group-key", "knid"), "'knid'"),
        (texts(*TEXT, "--label-key", "knid"), "'knid'"),
        (texts(*TEXT, "--out", "https://host/index"), "give --out DIR"),
        (texts(*TEXT, "--out", __file__), "no index can be written there"),
        (texts(*TEXT, "--out", f"{__file__}/below"), "no index can be written there"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    prepare: Callable[[Path], list[str]], message: str, tmp_path: Path, capsys: Capture
) -> None:
    words = prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert index(*words) == 2
    assert message in one_line(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"modalities": {"t": {"extensions": ["txt"], "kind": "text"}}}'])
def test_a_broken_index_is_made_anew_once_modalities_are_named(tmp_path: Path, content: str, capsys: Capture) -> None:
    write_texts(tmp_path, "a-0.tar")
    (tmp_path / "index.json").write_text(content)
    assert index(tmp_path) == 2
    assert "name the modalities" in one_line(capsys)
    assert index(tmp_path, *TEXT) == 0 and check(tmp_path) == 0


def test_shards_without_a_sample_are_told(tmp_path: Path, capsys: Capture) -> None:
    write_texts(tmp_path, "a-0.tar")
    (tmp_path / "a-1.tar").write_bytes(bytes(10240))
    assert index(tmp_path, "--modality", "text=.TXT") == 0
    assert "without a sample: a-1.tar" in capsys.readouterr().out and len(read_all(tmp_path)) == 3


# --- check ---


def flipped(folder: Path) -> str:
    path = folder / "train-1.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"train-1.tar 1")] ^= 1
    path.write_bytes(data)
    return path.name


def cut(folder: Path) -> str:
    path = folder / "train-2.tar"
    path.write_bytes(path.read_bytes()[:-700])
    return path.name


def swapped(folder: Path) -> str:
    one, other = folder / "train-0.tar", folder / "train-3.tar"
    data = one.read_bytes(), other.read_bytes()
    one.write_bytes(data[1]), other.write_bytes(data[0])
    return one.name


def gone(folder: Path) -> str:
    (folder / "train-3.tar").unlink()
    return "train-3.tar"


@pytest.mark.parametrize("damage", [flipped, cut, swapped, gone])
def test_check_finds_damage(damage: Callable[[Path], str], indexed: Path, capsys: Capture) -> None:
    name = damage(indexed)
    assert check(indexed) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{name}: ") and name in captured.err and captured.err.count("\n") == 1


def test_check_lists_every_broken_shard(indexed: Path, capsys: Capture) -> None:
    names = {*(damage(indexed) for damage in (flipped, cut, swapped)), "train-3.tar"}
    assert check(indexed) == 2
    captured = capsys.readouterr()
    assert {line.partition(":")[0] for line in captured.out.splitlines()} == names
    assert "4 of 4 shards" in captured.err and "and 1 more" in captured.err


def test_check_finds_a_changed_array_member(tmp_path: Path, capsys: Capture) -> None:
    rows = [{"__key__": f"{n}", "npy": np.lib.format.magic(1, 0) + bytes(50 + n)} for n in range(3)]
    write_shard(tmp_path / "a-0.tar", rows)
    assert index(tmp_path, "--modality", "ecg=npy") == 0
    data = bytearray((tmp_path / "a-0.tar").read_bytes())
    data[data.rindex(b"\x93NUMPY") + 20] = 7
    (tmp_path / "a-0.tar").write_bytes(data)
    assert check(tmp_path) == 2 and "a-0.tar" in one_line(capsys)


@pytest.mark.parametrize("name", ["members.npy", "present.npy", "keys.npy", "key_ends.npy"])
def test_check_finds_a_changed_array_of_the_index(name: str, indexed: Path, capsys: Capture) -> None:
    path = Index.load(indexed).arrays / name
    data = bytearray(path.read_bytes())
    data[-9 if name == "key_ends.npy" else -1] ^= 1
    path.write_bytes(data)
    assert check(indexed) == 2 and name in one_line(capsys)
    path.write_bytes(data[:-3])
    assert check(indexed) == 2 and name in one_line(capsys)
    assert index(indexed) == 0 and check(indexed) == 0


def test_check_of_a_server(indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    from mmrep.data import shard_cache

    monkeypatch.setattr(shard_cache, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("MMREP_CACHE", str(tmp_path / "cache"))
    with served(indexed) as (url, behaviour):
        behaviour.faults["train-0.tar"] = ["short", "500"]
        assert check(url) == 0
        assert len(list((tmp_path / "cache").glob("*.tar"))) >= 4
        monkeypatch.setenv("MMREP_CACHE", str(tmp_path / "another"))
        damaged = {flipped(indexed), cut(indexed)}
        assert check(url) == 2
        captured = capsys.readouterr()
        assert {line.partition(":")[0] for line in captured.out.splitlines()[1:]} == damaged
        assert "2 of 4 shards" in captured.err
        assert main(["data", "stats", url]) == 0
        monkeypatch.setenv("MMREP_CACHE", str(tmp_path / "cache"))
        shard = Index.load(indexed).shards[0]
        copy = tmp_path / "cache" / f"{shard.sha256}.tar"  # a disk may change what was verified when it came
        copy.write_bytes(bytes(shard.bytes))
        capsys.readouterr()
        assert check(url) == 0  # it is fetched again
        assert copy.read_bytes() == (indexed / shard.name).read_bytes()


# --- stats ---


def test_stats_print_a_table_and_write_a_page_once(indexed: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["data", "stats", str(indexed)]) == 0
    out = capsys.readouterr().out
    cells = sorted(line.split() for line in out.splitlines() if line.strip().startswith(("held_out", "train ")))
    assert [row[:3] + row[4:7] for row in cells] == [
        [split, "2", "6", "text", "6", "(100%)"] for split in ("held_out", "train")
    ]
    assert "group key: kind   labels: kind   excluded: 0   fingerprint: " in out
    page = tmp_path / "page.html"
    words = ["data", "stats", str(indexed), "--html", str(page)]
    assert main(words) == 0 and "train-3.tar 2" in page.read_text()
    assert f"page in {page}" in capsys.readouterr().out
    page.write_text("mine")
    assert main(words) == 2
    assert "--overwrite" in one_line(capsys) and page.read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0 and "train-3.tar 2" in page.read_text()
    capsys.readouterr()
    for wrong, message in ((f"{page}/below.html", "cannot be read or written"), (str(tmp_path), "the page exists")):
        assert main([*words[:-1], wrong]) == 2
        assert message in one_line(capsys)


def test_names_with_brackets_are_no_markup(tmp_path: Path, capsys: Capture) -> None:
    folder = write_texts(tmp_path / "[red]x[", "[bold]-0.tar")
    assert index(folder, "--modality", "[i]=txt") == 0
    assert main(["data", "stats", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "[red]x[" in out.replace("\n", "") and "[bold]" in out and "[i]" in out


@pytest.mark.parametrize("action", ["check", "stats"])
@pytest.mark.parametrize(
    ("place", "message"), [("nowhere", "no such folder"), ("pipe:cat x", "is no place"), ("file:///x", "is no place")]
)
def test_check_and_stats_of_nothing_are_one_line(action: str, place: str, message: str, capsys: Capture) -> None:
    assert main(["data", action, place]) == 2
    assert message in one_line(capsys)


def test_none_of_them_imports_torch(indexed: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from mmrep.cli import main; place, page, file = sys.argv[1:]; "
        "words = (['index', place, '--exclude', file], ['check', place], ['stats', place, '--html', page]); "
        "assert [main(['data', *each]) for each in words] == [0, 0, 0]; "
        "assert not {'torch', 'webdataset', 'pytorch_lightning'} & set(sys.modules)"
    )
    file = write_quarantine(tmp_path / "q.csv", indexed, ("train-1.tar", "001"))
    subprocess.run([sys.executable, "-c", code, indexed, tmp_path / "page.html", file], check=True, capture_output=True)
