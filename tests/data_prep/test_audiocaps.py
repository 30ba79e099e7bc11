"""AudioCaps' layout: clips by the names that downloaders give, groups, clips that are gone."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep import audiocaps
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from tests.data_prep.releases import put, put_csv, wav, write_audiocaps


@pytest.mark.parametrize("pattern", [*audiocaps.PATTERNS[:2], "{youtube_id}", "Y{youtube_id}", "{audiocap_id}"])
def test_audiocaps_finds_clips_by_the_names_that_downloaders_give(pattern: str, tmp_path: Path) -> None:
    root = write_audiocaps(tmp_path / "csv", tmp_path / "clips", pattern)
    words = ["--root", str(root), "--audio", str(tmp_path / "clips"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert audiocaps.main(words) == 0
    index = Index.load(tmp_path / "out")
    splits = {name: Samples(index, name) for name in ("train", "val", "test")}
    assert {name: len(samples) for name, samples in splits.items()} == {"train": 4, "val": 10, "test": 15}
    assert [splits["test"].has(n, "wav") for n in range(15)] == [n % 5 == 0 for n in range(15)]
    assert splits["train"].read(2, "wav") == wav(12) and splits["train"].read(2, "txt") == b"train clip 2, told 0"
    facts = json.loads(splits["test"].read(6, "json"))
    assert (facts["clip"], facts["caption"]) == ("-test_1_30", 1)
    assert facts["audiocap_ids"] == [str(10 + 4 + 10 + 5 + place) for place in range(5)]


def test_audiocaps_takes_a_pattern_and_refuses_one_that_names_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_audiocaps(tmp_path / "csv", tmp_path / "clips", "clip-{audiocap_id}")
    words = ["--root", str(root), "--audio", str(tmp_path / "clips"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert audiocaps.main([*words, "--pattern", "clip-{audiocap_id}.wav"]) == 0
    assert len(Samples(Index.load(tmp_path / "out"), "train")) == 4
    for wrong in ("clip.wav", "{id}", "{youtube_id", "{youtube_id:{width}}", "{youtube_id:{start_time.x}}"):
        assert audiocaps.main([*words, "--pattern", wrong, "--overwrite"]) == 2
        assert "--pattern" in capsys.readouterr().err


def test_audiocaps_lists_the_clips_that_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = tmp_path / "clips"
    root, out = write_audiocaps(tmp_path / "csv", clips), tmp_path / "out"
    (clips / "train" / "-train_1_30.wav").unlink()
    put(clips / "test" / "-test_0_0.wav", b"RIFF")
    assert audiocaps.main(["--root", str(root), "--audio", str(clips), "--out", str(out), "--workers", "1"]) == 0
    rejects = list(csv.DictReader((out / "rejects.csv").open()))
    assert rejects[0] | {"reason": ""} == {"split": "train", "entry": "1", "where": "-train_1_30.wav", "reason": ""}
    assert len(rejects) == 2 and "cannot be decoded" in rejects[1]["reason"]
    said = capsys.readouterr().out
    assert "train: 3 entries, 3 samples, 3 audio, 3 text, 1 rejects" in said and "test: 2 entries" in said


def test_audiocaps_without_any_clip_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_audiocaps(tmp_path / "csv", tmp_path / "clips")
    assert audiocaps.main(["--root", str(root), "--out", str(tmp_path / "out")]) == 2
    assert "no audio file below the folder" in capsys.readouterr().err


def test_audiocaps_with_odd_cells_and_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns named as the fields of a pattern, and a time that is no number."""
    root, out = write_audiocaps(tmp_path / "csv", tmp_path / "clips"), tmp_path / "out"
    rows = list(csv.reader((root / "train.csv").open()))
    more = [[*rows[0], "end_time", "start_ms", ""], *([*row, "x", "y", "z"] for row in rows[1:])]
    more += [["99", "gone", odd, "a caption", "", "", ""] for odd in ("\N{SUPERSCRIPT TWO}", "9" * 5000, "")]
    put_csv(root / "train.csv", more)
    words = ["--root", str(root), "--audio", str(tmp_path / "clips"), "--out", str(out), "--workers", "1"]
    assert audiocaps.main(words) == 0
    assert len(Samples(Index.load(out), "train")) == 4
    assert "train: 4 entries, 4 samples, 4 audio, 4 text, 3 rejects" in capsys.readouterr().out
    for wrong in ("{youtube_id:d}", "{start_time!q}", "{end_time:z}"):
        assert audiocaps.main([*words, "--pattern", wrong, "--overwrite"]) == 2
        assert capsys.readouterr().err.startswith("error: --pattern")


def test_a_file_system_that_is_away_is_not_taken_for_clips_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, scandir = write_audiocaps(tmp_path / "csv", tmp_path / "clips"), os.scandir
    words = ["--root", str(root), "--audio", str(tmp_path / "clips"), "--workers", "1"]
    for code, answer in ((errno.ESTALE, 2), (errno.EACCES, 0)):

        def failing(place: Any, code: int = code) -> Any:
            if place == str(tmp_path / "clips" / "val"):
                raise OSError(code, os.strerror(code), place)
            return scandir(place)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", failing)
            assert audiocaps.main([*words, "--out", str(tmp_path / str(code))]) == answer
        assert (os.strerror(code) in capsys.readouterr().err) == (answer == 2)
