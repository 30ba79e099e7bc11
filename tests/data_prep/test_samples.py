"""Writing a release: what an ended run leaves, what is refused, what nothing is lost of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.released_files import format_of, inside, read_csv
from data_prep.samples import JOURNAL, Members, Release, write_release
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.errors import DataError
from tests.data_prep.releases import put
from tests.tiny import file_bytes


def make(split: str, number: int) -> Sequence[Members]:
    if number == 3:
        raise DataError("cannot be used (3)", where="file 3")
    if number == 5:
        raise OSError(5, "Input/output error", "file 5")
    return [{"txt": f"{split} {number}", "json": {"number": number}}]


RELEASE = Release(
    "numbers", {"train": range(10), "test": range(2)}, make, {"text": (("txt",), "text")}, provenance={"version": 1}
)


class KilledError(Exception):
    """What ends a run in the middle."""


def test_a_run_goes_on_where_it_ended_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """KilledError in the third shard, with a line of the journal cut short: two shards are kept, not made again."""
    whole = tmp_path / "whole"
    write_release(RELEASE, whole, shard_entries=3)

    def dying(split: str, number: int) -> Sequence[Members]:
        if number == 7:
            raise KilledError
        return make(split, number)

    out = tmp_path / "out"
    with pytest.raises(KilledError):
        write_release(replace(RELEASE, make=dying), out, shard_entries=3)
    assert {path.name for path in out.iterdir()} == {JOURNAL, "train-000000.tar", "train-000001.tar"}
    with (out / JOURNAL).open("a") as journal:
        journal.write('{"name": "train-0000')
    made: list[int] = []

    def counting(split: str, number: int) -> Sequence[Members]:
        made.append(number)
        return make(split, number)

    reports = write_release(replace(RELEASE, make=counting), out, shard_entries=3)
    assert made == [6, 7, 8, 9, 0, 1] and file_bytes(out) == file_bytes(whole)
    assert sum(report.samples for report in reports) == 10 and sum(len(report.rejects) for report in reports) == 2


def test_entries_that_fail_are_listed_with_what_is_wrong(tmp_path: Path) -> None:
    write_release(RELEASE, tmp_path / "out", shard_entries=4)
    assert (tmp_path / "out" / "rejects.csv").read_text() == (
        "split,entry,where,reason\ntrain,3,file 3,cannot be used (3)\ntrain,5,file 5,Input/output error\n"
    )
    samples = Samples(Index.load(tmp_path / "out"), "train")
    assert [samples.key(n) for n in range(3, 5)] == ["train-00000004", "train-00000006"]
    assert samples.read(3, "txt") == b"train 4"


def test_a_shard_of_rejects_alone_is_not_written(tmp_path: Path) -> None:
    write_release(RELEASE, tmp_path / "out", shard_entries=1)
    assert not (tmp_path / "out" / "train-000003.tar").exists()
    assert len(Samples(Index.load(tmp_path / "out"), "train")) == 8


def test_no_usable_entry_is_an_error_that_shows_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of 1 entries of numbers can be used; the first: cannot be used \(3\)"):
        write_release(replace(RELEASE, splits={"train": [3]}), tmp_path / "out")


def test_what_was_there_is_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out / "notes.txt", "mine")
    with pytest.raises(DataError, match="not empty"):
        write_release(RELEASE, out)
    write_release(RELEASE, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and len(Samples(Index.load(out), "test")) == 2
    with pytest.raises(DataError, match="not empty"):
        write_release(RELEASE, out)


def test_an_ended_run_of_other_files_is_not_mixed_in(tmp_path: Path) -> None:
    def dying(split: str, number: Any) -> Sequence[Members]:
        raise KilledError

    with pytest.raises(KilledError):
        write_release(replace(RELEASE, make=dying), tmp_path / "out")
    for other in (replace(RELEASE, provenance={"version": 2}), replace(RELEASE, splits={"train": range(9)})):
        with pytest.raises(DataError, match="a run of other files or options"):
            write_release(other, tmp_path / "out")
    write_release(RELEASE, tmp_path / "out")


@pytest.mark.parametrize("option", ["limit", "shard_entries", "workers"])
def test_numbers_below_one_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give at least 1"):
        write_release(RELEASE, tmp_path / "out", **{option: 0})


def test_files_of_a_release(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/../b.jpg") == tmp_path / "b.jpg"
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(DataError, match="outside"):
            inside(tmp_path, name)
    assert (format_of(b"\xff\xd8\xff\xe0", 0), format_of(b"ID3\x04", 0)) == ("jpg", "mp3")
    with pytest.raises(DataError, match="unknown format"):
        format_of(b"GIF89a", "row 3")
    table = put(tmp_path / "t.csv", "a,b\n1\n2,3,4\n")
    assert read_csv(table, ("a", "b")) == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}]
    with pytest.raises(DataError, match="no column c"):
        read_csv(table, ("c",))
