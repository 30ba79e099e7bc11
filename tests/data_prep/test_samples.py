"""Writing a release: what an ended run leaves, what is refused, what nothing is lost of."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep import released_files
from data_prep.building.build_folder import BuildFolder, HopelessError, InPlaceError
from data_prep.building.read_file import read_file
from data_prep.release_command import summary
from data_prep.released_files import inside, read_csv, read_member
from data_prep.samples import Members, Release, write_release
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.errors import DataError
from tests.data_prep.failing_files import fail_to_open
from tests.data_prep.releases import put
from tests.killed import ended, forked
from tests.tiny import file_bytes, png


def make(split: str, number: int) -> Sequence[Members]:
    if number == 3:
        raise DataError("cannot be used (3)", where="file 3")
    if number == 5:
        raise OSError(errno.EACCES, "Permission denied", "file 5")
    return [{"txt": f"{split} {number}", "json": {"number": number}}]


RELEASE = Release(
    "numbers", {"train": range(10), "test": range(2)}, [], make, {"text": (("txt",), "text")}, provenance={"version": 1}
)


class KilledError(Exception):
    """What ends a run in the middle."""


def test_a_run_goes_on_where_it_ended_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """KilledError in the third shard: two shards are kept, not made again."""
    whole = tmp_path / "whole"
    write_release(RELEASE, whole, shard_entries=3)

    def dying(split: str, number: int) -> Sequence[Members]:
        if number == 7:
            raise KilledError
        return make(split, number)

    out = tmp_path / "out"
    with pytest.raises(KilledError):
        write_release(replace(RELEASE, make=dying), out, shard_entries=3)
    assert not out.exists()
    assert {path.name for path in out.with_name("out.part").glob("*.tar")} == {"train-000000.tar", "train-000001.tar"}
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
        "split,entry,where,reason\ntrain,3,file 3,cannot be used (3)\ntrain,5,file 5,Permission denied\n"
    )
    samples = Samples(Index.load(tmp_path / "out"), "train")
    assert [samples.key(n) for n in range(3, 5)] == ["train-00000004", "train-00000006"]
    assert samples.read(3, "txt") == b"train 4"


def test_a_file_system_that_is_away_ends_the_run_and_makes_no_reject(tmp_path: Path) -> None:
    picture = tmp_path / "7.png"
    picture.write_bytes(png((1, 2, 3)))

    def reading(split: str, number: int) -> Sequence[Members]:
        if number == 7:
            read_member("image", picture)
        return make(split, number)

    out, release = tmp_path / "out", replace(RELEASE, make=reading)
    for code in (errno.ESTALE, errno.EIO):
        with pytest.MonkeyPatch.context() as patch:
            fail_to_open(patch, "7.png", code)
            with pytest.raises(OSError, match=r"7\.png"):
                write_release(release, out, shard_entries=3)
        assert len(list(out.with_name("out.part").glob("*.tar"))) == 2
    write_release(release, out, shard_entries=3)
    write_release(RELEASE, tmp_path / "whole", shard_entries=3)
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


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
    put(out / "train-000000.tar", "mine too")
    with pytest.raises(DataError, match=r"no readable index\.json"):
        write_release(RELEASE, out, overwrite=True)
    assert file_bytes(out) == {"notes.txt": b"mine", "train-000000.tar": b"mine too"}
    shutil.rmtree(out)
    write_release(RELEASE, out, shard_entries=2)
    put(out / "notes.txt", "mine")
    put(out / "backup.tar", "mine")
    write_release(RELEASE, out, overwrite=True)
    assert {path.name for path in out.glob("*.tar")} == {"backup.tar", "test-000000.tar", "train-000000.tar"}
    assert (out / "notes.txt").read_text() == "mine" and len(Samples(Index.load(out), "test")) == 2
    with pytest.raises(DataError, match="not empty"):
        write_release(RELEASE, out)


def test_an_ended_run_of_other_files_is_not_mixed_in(tmp_path: Path) -> None:
    def dying(split: str, number: Any) -> Sequence[Members]:
        raise KilledError

    with pytest.raises(KilledError):
        write_release(replace(RELEASE, make=dying), tmp_path / "out")
    file = put(tmp_path / "table.csv", "a")
    for other, what in (
        (replace(RELEASE, provenance={"version": 2}), "provenance"),
        (replace(RELEASE, splits={"train": range(9)}), "plan"),
        (replace(RELEASE, files=[file]), "file"),
    ):
        with pytest.raises(DataError, match=rf"asked for something else \(another {what}\)"):
            write_release(other, tmp_path / "out")
    with pytest.raises(DataError, match=r"another option"):
        write_release(RELEASE, tmp_path / "out", options={"image_size": 9})
    write_release(RELEASE, tmp_path / "out")


def tagged(tag: str, pause: float) -> Release:
    def slow(split: str, number: int) -> Sequence[Members]:
        time.sleep(pause)
        return [{"txt": f"{tag} {number}", "json": {"number": number}}]

    return replace(RELEASE, make=slow, splits={"train": range(40)}, provenance={"tag": tag})


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_workers_of_a_killed_run_write_nothing_into_the_next(by: signal.Signals, tmp_path: Path) -> None:
    """The first run is killed alone; the second begins anew at once, while the first one's workers may still live."""
    out = tmp_path / "out"
    process = forked(lambda: len(write_release(tagged("old", 0.1), out, shard_entries=10, workers=2)), tmp_path / "log")
    while not list(tmp_path.glob("out.part/train-*.part*")):
        time.sleep(0.01)
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    assert ended(process, 0, by) == -by and len(children) >= 2
    write_release(tagged("new", 0), out, shard_entries=10, workers=2, overwrite=True)
    assert not any(running(child) for child in children), "the lock was theirs"
    index = json.loads((out / "index.json").read_text())
    assert len(index["shards"]) == 4 and not out.with_name("out.part").exists()
    for shard in index["shards"]:
        assert hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
        with tarfile.open(out / shard["name"]) as tar:
            texts = [tar.extractfile(member) for member in tar if member.name.endswith(".txt")]
            assert all(text is not None and text.read().startswith(b"new") for text in texts)


def running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_runs_do_not_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.building.lock.SECONDS_FOR_ORPHANS", 0.2)
    out = tmp_path / "out"
    process = forked(lambda: write_release(tagged("old", 0.02), out, shard_entries=10) and 0, tmp_path / "log")
    while not list(tmp_path.glob("out.part/train-*.part*")):
        time.sleep(0.01)
    with pytest.raises(DataError, match="another run is building here"):
        write_release(tagged("new", 0), out, overwrite=True)
    assert ended(process) == 0 and len(Samples(Index.load(out), "train")) == 40


def test_who_waited_for_a_run_that_ended_is_told(tmp_path: Path) -> None:
    """The folder that it waited for has become the result."""
    out = tmp_path / "out"
    process = forked(lambda: write_release(tagged("old", 0.02), out, shard_entries=10) and 0, tmp_path / "log")
    while not list(tmp_path.glob("out.part/train-*.part*")):
        time.sleep(0.01)
    with pytest.raises(DataError, match="another run has just ended here"):
        write_release(tagged("new", 0), out, overwrite=True)
    assert ended(process) == 0 and len(Samples(Index.load(out), "train")) == 40


def test_a_replacement_that_is_killed_half_way_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside files of the user the result is moved file by file."""
    out = tmp_path / "out"
    write_release(RELEASE, out, shard_entries=2)
    put(out / "notes.txt", "mine")
    move, moved = Path.replace, list[Path]()

    def dying(self: Path, target: Path) -> Path:
        if Path(target).parent == out and len(moved) == 1:
            raise KilledError
        if Path(target).parent == out:
            moved.append(self)
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(KilledError):
            write_release(RELEASE, out, shard_entries=5, overwrite=True)
    with pytest.raises(InPlaceError):
        write_release(RELEASE, out, shard_entries=5, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and not out.with_name("out.part").exists()
    (out / "notes.txt").unlink()
    write_release(RELEASE, tmp_path / "whole", shard_entries=5)
    assert file_bytes(out) == file_bytes(tmp_path / "whole")


def killed_at(step: int, out: Path, entries: int, overwrite: bool = False) -> bool:
    """Write the release and be killed at this step of publishing it; whether there was such a step."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, step)
        try:
            write_release(RELEASE, out, shard_entries=entries, overwrite=overwrite)
        except KilledError:
            return True
    return False


def die_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """The publishing of a result is killed before it changes the file system for the n-th time."""
    steps: list[str] = []

    def dying(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def changing(*args: Any, **kwargs: Any) -> Any:
            steps.append(f"{name} {args[0]}")
            if len(steps) == step + 1:
                raise KilledError
            return real(*args, **kwargs)

        patch.setattr(owner, name, changing)

    def publish(self: BuildFolder) -> None:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")):
            dying(owner, name)
        real_publish(self)

    real_publish = BuildFolder.publish
    patch.setattr(BuildFolder, "publish", publish)


@pytest.mark.parametrize("beside", [False, True])
def test_killed_at_any_step_of_publishing(beside: bool, tmp_path: Path) -> None:
    """Nothing is made twice, nor lost to a command that asks for something else; beside files of the user or not."""
    write_release(RELEASE, tmp_path / "whole", shard_entries=3)
    whole = file_bytes(tmp_path / "whole") | ({"notes.txt": b"mine"} if beside else {})

    def never(split: str, number: int) -> Sequence[Members]:
        raise AssertionError("made anew")

    for step in range(100):
        out = tmp_path / str(step) / "out"
        if beside:
            write_release(RELEASE, out, shard_entries=2)
            put(out / "notes.txt", "mine")
        if not killed_at(step, out, 3, beside):
            break
        if step % 2:
            with pytest.raises(DataError, match=r"something else|not empty"):
                write_release(RELEASE, out, shard_entries=4)
        again = replace(RELEASE, make=never)
        with suppress(InPlaceError):
            write_release(again, out, shard_entries=3, overwrite=beside)
        assert file_bytes(out) == whole, step
        assert list(out.parent.iterdir()) == [out], step
    assert step >= (8 if not beside else 16) and file_bytes(out) == whole and list(out.parent.iterdir()) == [out]


def test_what_a_killed_publishing_left_gives_way_to_something_else(tmp_path: Path) -> None:
    write_release(RELEASE, tmp_path / "whole", shard_entries=4)
    for step in range(4):
        out = tmp_path / str(step) / "out"
        assert killed_at(step, out, 3)
        write_release(RELEASE, out, shard_entries=4, overwrite=True)
        assert file_bytes(out) == file_bytes(tmp_path / "whole") and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b'{"samples": 3, "by', b"[]", b"{}"])
def test_a_damaged_record_costs_its_shard_alone(content: bytes, tmp_path: Path) -> None:
    """As a loss of power leaves it."""
    out = tmp_path / "out"
    assert killed_at(0, out, 3)
    put(tmp_path / "out.part" / "unfinished" / "train-000001.tar.json", content)
    made: list[int] = []

    def counting(split: str, number: int) -> Sequence[Members]:
        made.append(number)
        return make(split, number)

    write_release(replace(RELEASE, make=counting), out, shard_entries=3)
    write_release(RELEASE, tmp_path / "whole", shard_entries=3)
    assert made == [3, 4, 5] and file_bytes(out) == file_bytes(tmp_path / "whole")


def test_a_damaged_record_of_what_was_asked_for_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert killed_at(0, out, 1000)
    put(tmp_path / "out.part" / "unfinished" / "request.json", "")
    before = file_bytes(tmp_path / "out.part")
    with pytest.raises(DataError, match=r"its record is damaged\) .*--overwrite to begin anew"):
        write_release(RELEASE, out)
    assert file_bytes(tmp_path / "out.part") == before
    write_release(RELEASE, out, overwrite=True)


def test_a_shard_of_others_is_not_replaced(tmp_path: Path) -> None:
    """In a folder of ours, by a name that its index has not."""
    out = tmp_path / "out"
    write_release(RELEASE, out)
    mine = put(out / "train-000001.tar", "mine")
    before = file_bytes(out)
    with pytest.raises(DataError, match="a file of others has the name of a new shard"):
        write_release(RELEASE, out, shard_entries=5, overwrite=True)
    assert file_bytes(out) == before
    mine.rename(tmp_path / "away")
    made: list[int] = []

    def counting(split: str, number: int) -> Sequence[Members]:
        made.append(number)
        return make(split, number)

    write_release(replace(RELEASE, make=counting), out, shard_entries=5, overwrite=True)
    assert not made and len(json.loads((out / "index.json").read_text())["shards"]) == 3, "what was built is kept"


@pytest.mark.parametrize("option", ["limit", "shard_entries", "workers"])
def test_numbers_below_one_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="give at least 1"):
        write_release(RELEASE, tmp_path / "out", **{option: 0})


def test_no_name_leads_out_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert inside(Path(), "a/b.jpg") == Path("a/b.jpg") and inside(Path("x/.."), "b.jpg") == Path("x/../b.jpg")
    for name in ("../../etc/secret.jpg", "../y", "/etc/passwd", "a/../../y", "a\0b"):
        for root in (Path(), Path("x"), Path("x/..")):
            with pytest.raises(DataError, match="outside"):
                inside(root, name)


def test_files_are_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "t.csv", "a\n123\n")
    assert read_file(file, 6, file) == b"a\n123\n"
    with pytest.raises(DataError, match="more than 5 bytes"):
        read_file(file, 5, file)
    monkeypatch.setattr(released_files, "MAX_CSV_BYTES", 5)
    with pytest.raises(DataError, match="more than 5 bytes"):
        read_csv(file, ("a",))
    with pytest.raises(DataError, match="no such file"):
        read_file(Path("/dev/zero"), 5, "zero")


def test_files_of_a_release(tmp_path: Path) -> None:
    assert inside(tmp_path, "a/../b.jpg") == tmp_path / "b.jpg"
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(DataError, match="outside"):
            inside(tmp_path, name)
    table = put(tmp_path / "t.csv", "a,b\n1\n2,3,4\n")
    assert read_csv(table, ("a", "b")) == [{"a": "1", "b": ""}, {"a": "2", "b": "3"}]
    with pytest.raises(DataError, match="no column c"):
        read_csv(table, ("c",))


def test_half_a_character_ends_nothing(tmp_path: Path) -> None:
    """JSON's escapes can name one, in a caption and in a file's name; UTF-8 cannot hold it."""

    def cut(split: str, number: int) -> Sequence[Members]:
        if number == 1:
            raise DataError("no such file", where="\ud83d.jpg")
        return [{"txt": "a cat \ud83d", "json": {"caption": "\ud83d"}}]

    out = tmp_path / "out"
    write_release(replace(RELEASE, splits={"train": range(2)}, make=cut), out)
    samples = Samples(Index.load(out), "train")
    assert samples.read(0, "txt") == b"a cat ?" and json.loads(samples.read(0, "json")) == {"caption": "?"}
    assert (out / "rejects.csv").read_text(encoding="utf-8").splitlines()[1] == "train,1,?.jpg,no such file"


def test_a_modality_that_no_sample_has_is_left_out_and_told(tmp_path: Path) -> None:
    release = replace(RELEASE, modalities={**RELEASE.modalities, "image": (("jpg", "png"), "image")})
    reports = write_release(release, tmp_path / "out")
    assert list(Index.load(tmp_path / "out").modalities) == ["text"]
    assert "no sample has image: it is left out of index.json" in summary(release, reports)
    assert "left out" not in summary(RELEASE, reports)
    with pytest.raises(DataError, match="none of 12 entries of numbers can be used"):
        write_release(replace(release, modalities={"image": (("jpg",), "image")}), tmp_path / "other")
    assert not (tmp_path / "other.part").exists()


def test_files_that_change_while_they_are_read_give_nothing(tmp_path: Path) -> None:
    file = put(tmp_path / "table.csv", "a")

    def changing(split: str, number: int) -> Sequence[Members]:
        put(file, "a" * (number + 2))
        return make(split, number)

    with pytest.raises(HopelessError, match="files of numbers changed while they were read"):
        write_release(replace(RELEASE, files=[file], make=changing), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()
