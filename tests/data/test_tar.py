"""The tar walker against tarfile, and against damage: an original tuple or a DataError, never anything else."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from mmrep.data.scan import group_members
from mmrep.data.tar import walk
from mmrep.data.writer import write_shard
from mmrep.errors import DataError
from tests.tiny import damaged


def make_tar(path: Path, members: dict[str, bytes], format: int, encoding: str = "utf-8") -> Path:
    with tarfile.open(path, "w", format=format, encoding=encoding) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    return {member.name: whole[member.offset : member.offset + member.size] for member in walk(path)}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(tmp_path: Path, format: int) -> None:
    members = {f"{'folder/' * i}{i:03d}.txt": bytes([i]) * (i * 137) for i in range(12)}
    if format != tarfile.USTAR_FORMAT:
        members |= {"x" * 180 + ".txt": b"long", "élan/ключ.txt": "ü".encode()}
    assert contents(make_tar(tmp_path / "a.tar", members, format)) == members


@pytest.mark.parametrize("length", [5, 150])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_names_that_are_no_utf_8_are_read_with_marks_in_them(tmp_path: Path, format: int, length: int) -> None:
    """Also those of more than 100 bytes, which GNU stores apart and ustar in two parts."""
    name = "é" * (length // 3) + "/" + "é" * (length // 2)
    path = make_tar(tmp_path / "a.tar", {f"{name}.txt": b"x"}, format, encoding="latin-1")
    assert contents(path) == {f"{name}.txt".replace("é", "\ufffd"): b"x"}


def test_reads_what_the_tar_command_writes(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_bytes(b"a" * 700)
    (tmp_path / "in" / "sub" / "b.txt").write_bytes(b"")
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path / "in", "."], check=True)
    assert contents(tmp_path / "a.tar") == {"a.txt": b"a" * 700, "sub/b.txt": b""}


def test_reads_what_webdataset_writes_and_the_other_way_round(tmp_path: Path) -> None:
    import webdataset

    samples = [{"__key__": f"k{i}", "txt": f"text {i}", "json": {"n": i}} for i in range(5)]
    with webdataset.ShardWriter(str(tmp_path / "theirs-%d.tar"), verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    assert [key for key, _ in group_members(tmp_path / "theirs-0.tar")] == [f"k{i}" for i in range(5)]
    write_shard(tmp_path / "ours.tar", samples)
    read = list(webdataset.WebDataset(str(tmp_path / "ours.tar"), shardshuffle=False))
    assert [(sample["__key__"], sample["txt"]) for sample in read] == [
        (f"k{i}", f"text {i}".encode()) for i in range(5)
    ]


@pytest.mark.parametrize("damage", ["cut", "flip", "zero"])
def test_damage_never_mispairs(tmp_path: Path, damage: str) -> None:
    """Header damage, cuts and zeroed blocks at random places: what is still read are original members."""
    samples = [{"__key__": f"{i:03d}", "jpg": bytes([i]) * 600, "txt": bytes([i]) * 40} for i in range(1, 12)]
    write_shard(tmp_path / "whole.tar", samples)
    whole = (tmp_path / "whole.tar").read_bytes()
    rng, refused = random.Random(0), 0
    for _ in range(300):
        (tmp_path / "broken.tar").write_bytes(damaged(whole, damage, rng))
        try:
            found = group_members(tmp_path / "broken.tar")
        except DataError as error:
            refused += "broken.tar" in str(error)
            continue
        assert [key for key, _ in found] == [sample["__key__"] for sample in samples]
        assert all(set(members) == {"jpg", "txt"} for _, members in found)
    assert refused > 50


def test_a_declared_giant_is_refused_at_once(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 35
    (tmp_path / "bomb.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=f"{1 << 35} bytes"):
        list(walk(tmp_path / "bomb.tar"))


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../up.txt", "a/../../b.txt", "a\nb.txt", "a//b.txt"])
def test_unsafe_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="unsafe name"):
        list(walk(make_tar(tmp_path / "a.tar", {name: b"x"}, tarfile.GNU_FORMAT)))


def test_links_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="link or device"):
        list(walk(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["a.jpg", "b.jpg", "a.txt"], "side by side"),
        (["a.jpg", "a.jpg"], "two members"),
        (["a.pkl"], "unsafe format"),
        (["a.npz"], "unsafe format"),
        (["a.__key__"], "unsafe format"),
    ],
)
def test_samples_that_cannot_be_trusted_are_refused(tmp_path: Path, members: list[str], message: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in members:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(DataError, match=message):
        group_members(tmp_path / "a.tar")


def test_an_empty_tar_has_no_samples_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert group_members(make_tar(tmp_path / "a.tar", {}, tarfile.GNU_FORMAT)) == []
    (tmp_path / "b.tar").touch()
    with pytest.raises(DataError, match="ends in the middle"):
        group_members(tmp_path / "b.tar")
