"""What holds for all readers of releases: a killed run goes on, processes and kills change no byte, signals end it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from data_prep import audiocaps, clotho, cmu_mosei, coco, symile_m3, symile_mimic
from data_prep.building.finished_shards import FinishedShards
from tests.data_prep.releases import (
    write_audiocaps,
    write_clotho,
    write_cmu_mosei,
    write_coco,
    write_karpathy,
    write_symile_m3,
    write_symile_mimic,
)
from tests.killed import ended, forked
from tests.tiny import file_bytes


class Reader(NamedTuple):
    """A reader: its command, the words that name a small release which is written first, and a file that it reads."""

    main: Callable[[Sequence[str]], int]
    words: Callable[[Path], list[str]]
    read: str


def folds(root: Path) -> list[str]:
    pytest.importorskip("h5py", reason="pip install 'mmrep[mosei]'")
    return ["--root", str(write_cmu_mosei(root)), "--folds", str(root / "cmu_mosei_std_folds.py")]


READERS = {
    "coco": Reader(coco.main, lambda root: ["--root", str(write_coco(root))], "train2017/000000000001.jpg"),
    "karpathy": Reader(
        coco.main,
        lambda root: ["--karpathy", str(write_karpathy(root)), "--root", str(root)],
        f"val2014/COCO_val2014_{0:012d}.jpg",
    ),
    "clotho": Reader(clotho.main, lambda root: ["--root", str(write_clotho(root))], "clotho_metadata_development.csv"),
    "audiocaps": Reader(
        audiocaps.main, lambda root: ["--root", str(write_audiocaps(root, root / "clips"))], "clips/val/-val_1_30.wav"
    ),
    "symile_m3": Reader(
        symile_m3.main, lambda root: ["--root", str(write_symile_m3(root))], "val-00000-of-00001.parquet"
    ),
    "symile_mimic": Reader(
        symile_mimic.main, lambda root: ["--root", str(write_symile_mimic(root))], "data_npy/test/ecg_test.npy"
    ),
    "cmu_mosei": Reader(cmu_mosei.main, folds, "acoustic/CMU_MOSEI_COVAREP.csd"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_killed_run_goes_on_to_the_bytes_of_one_process(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process to the end; two that are killed after a shard, and again two. Then with a file that has changed meanwhile."""
    reader, root, out = READERS[name], tmp_path / "release", tmp_path / "out"
    words = [*reader.words(root), "--shard-entries", "2"]
    assert reader.main([*words, "--out", str(tmp_path / "expected"), "--workers", "1"]) == 0
    again = [*words, "--out", str(out), "--workers", "2"]
    killed_after_a_shard(lambda: reader.main(again), tmp_path)
    capsys.readouterr()
    assert reader.main(again) == 0
    assert "shards were there" in capsys.readouterr().err
    assert file_bytes(out) == file_bytes(tmp_path / "expected") and not (tmp_path / "out.part").exists()

    killed_after_a_shard(lambda: reader.main([*again, "--overwrite"]), tmp_path)
    (root / reader.read).touch()
    assert reader.main([*words, "--out", str(tmp_path / "out"), "--overwrite"]) == 0
    assert "shards were there" not in capsys.readouterr().err, "begun anew"


def killed_after_a_shard(work: Callable[[], int], folder: Path) -> None:
    process = forked(lambda: slowed(work), folder / "log")
    end = time.monotonic() + 30
    while not list((folder / "out.part" / "unfinished").glob("*.tar.json")):
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.005)
    assert ended(process, 0, signal.SIGKILL) == -signal.SIGKILL


def slowed(work: Callable[[], int]) -> int:
    write = FinishedShards.write

    def slowly(self: FinishedShards, *words: object) -> None:
        time.sleep(0.1)
        write(self, *words)  # type: ignore[arg-type]  # as they came

    FinishedShards.write = slowly  # type: ignore[method-assign,assignment]  # only in a fork
    return work()


def test_a_changed_file_or_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_audiocaps(tmp_path / "release", tmp_path / "release" / "clips")
    words = ["--root", str(root), "--out", str(tmp_path / "out"), "--shard-entries", "2"]
    killed_after_a_shard(lambda: audiocaps.main(words), tmp_path)
    assert audiocaps.main([*words, "--pattern", "{youtube_id}_{start_time}"]) == 2
    assert "asked for something else (another option)" in capsys.readouterr().err
    (root / "clips" / "train" / "-train_1_30.wav").touch()
    assert audiocaps.main(words) == 2
    assert "asked for something else (another file)" in capsys.readouterr().err


def test_sigterm_ends_it_with_a_line(tmp_path: Path) -> None:
    words = ["--root", str(write_clotho(tmp_path / "release")), "--out", str(tmp_path / "out"), "--shard-entries", "1"]
    process = forked(lambda: slowed(lambda: clotho.main(words)), tmp_path / "log")
    while not list((tmp_path / "out.part" / "unfinished").glob("*.tar.json")):
        time.sleep(0.005)
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    assert len(children) == 2 and ended(process, 0, signal.SIGTERM) == 128 + signal.SIGTERM
    said = (tmp_path / "log").read_text().splitlines()
    assert said == ["stopped by SIGTERM; finished shards are kept, the same command goes on"]
    assert not any(Path(f"/proc/{child}").exists() for child in children)
