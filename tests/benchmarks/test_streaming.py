"""The benchmark of the data layer: both sides do the same work, and the committed rows have their gates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import streaming
from benchmarks.pictures import PictureSet, write_pictures
from benchmarks.streaming import Shards

RESULT = Path(__file__).parents[2] / streaming.RESULT


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("pictures")
    return Shards(folder, write_pictures(folder, PictureSet((20, 40), 10.0, 24)), 24)


def test_both_sides_give_every_picture_once(few: Shards) -> None:
    for backend in ("torch", "opencv"):
        (batch,) = streaming.ours(few, backend)
        image = batch.inputs["image"]
        assert isinstance(image, torch.Tensor) and image.shape == (24, 3, 224, 224) and image.dtype == torch.uint8
        assert sorted(batch.keys) == [f"{number:09d}" for number in range(24)] and not batch.faults
    ((pictures, captions),) = streaming.theirs(few)
    assert pictures.shape == (24, 3, 224, 224) and pictures.dtype == torch.float32 and len(set(captions)) == 24


def test_both_readers_read_all_members(few: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmrep.data.shard_files import ShardFiles

    real, asked = ShardFiles.read, []

    def read(self: ShardFiles, shard: int, offset: int, size: int) -> bytes:
        asked.append(size)
        return real(self, shard, offset, size)

    monkeypatch.setattr(ShardFiles, "read", read)
    assert streaming.read_ours(few)() == streaming.read_theirs(few)() == 3 * 24
    payload = sum(file.stat().st_size for file in few.files)
    assert 0.5 * payload < sum(asked) <= payload


def test_a_part_is_only_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert streaming.main(["--only", "resume", "--rounds", "1", "--out", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["held"] and "resume in the middle" in capsys.readouterr().out
    again = ["--only", "resume", "--rounds", "1", "--keep", "--out", str(tmp_path / "rows.json")]
    assert streaming.main(again) == 0 and len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 1
    with pytest.raises(SystemExit):
        streaming.main(["--only", "nothing"])


def test_the_committed_result_has_the_gates() -> None:
    rows = json.loads(RESULT.read_text())["rows"]
    gates = {row["case"]: row["gate"] for row in rows if row["gate"] is not None and row["metric"] == "CPU ms a sample"}
    assert gates == {
        "64-224 px, at Pillow parity": pytest.approx(1 / 2),
        "320-512 px, at Pillow parity": pytest.approx(1 / 1.4),
        "64-224 px, opencv resize": pytest.approx(1 / 3.5),
        "64-224 px, reading alone with crc32": pytest.approx(1 / 15),
    }
    assert all(row["held"] == (row["ratio"] <= row["gate"]) for row in rows if row["gate"] is not None)
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) for row in rows)


def test_the_readme_and_the_page_say_what_was_measured() -> None:
    rows = {(row["case"], row["metric"], row["theirs_is"]): row for row in json.loads(RESULT.read_text())["rows"]}
    for case in ("64-224 px, at Pillow parity", "320-512 px, at Pillow parity", "64-224 px, opencv resize"):
        row = rows[case, "CPU ms a sample", "open_clip-like webdataset"]
        figures = f"| {row['ours']:.3f} | {row['theirs']:.3f} | {row['ratio']:.3f} |"
        for page in ("README.md", "docs/streaming.md"):
            assert figures in (RESULT.parents[2] / page).read_text(), (page, case, figures)
    row = rows["64-224 px, reading alone with crc32", "CPU ms a sample", "webdataset"]
    for page in ("README.md", "docs/streaming.md"):
        assert (
            f"| {row['ours']:.4f} | {row['theirs']:.4f} | {row['ratio']:.3f} |"
            in (RESULT.parents[2] / page).read_text()
        )
