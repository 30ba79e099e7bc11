"""The embedding job on Ray gives the files of the plain job."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mmrep.cli import main
from mmrep.data.build import build_index
from mmrep.data.writer import write_shard
from tests.ray_session import local_ray  # noqa: F401 - a fixture
from tests.search.conftest import embed, small
from tests.tiny import MODALITIES, file_bytes, sample


def words(folder: Path, shards: Path, out: Path, *more: str) -> list[str]:
    small().save_pretrained(folder / "model")
    return [
        *("embed", "--checkpoint", str(folder / "model"), "--data", str(shards), "--out", str(out)),
        *("--batch-size", "9", "--format", "parquet", "--engine", "ray", "--concurrency", "1", *more),
    ]


@pytest.mark.usefixtures("local_ray")
def test_the_same_bytes_and_what_is_finished_is_kept(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    embed(small(), tiny_shards, tmp_path / "expected", file_format="parquet")
    embed(small(), tiny_shards, out, file_format="parquet", worker=0, workers=2)  # began without Ray
    left = 5 - len(list(out.glob("rows/*.parquet")))
    assert main(words(tmp_path, tiny_shards, out)) == 0
    found = capsys.readouterr()
    assert f"{left} shards embedded, {5 - left} were there\ncomplete: 88 samples in 5 shards" in found.out
    assert file_bytes(out) == file_bytes(tmp_path / "expected")
    assert "Traceback" not in found.err


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_broken_samples_and_shards_arrive_as_they_do_without_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    samples = [sample(f"k{number:02d}", number) for number in range(12)]
    samples[2]["png"] = b"\x89PNG no picture"
    write_shard(shards / "train-000000.tar", samples[:6])
    write_shard(shards / "train-000001.tar", samples[6:])
    build_index(shards, MODALITIES).save()
    whole = (shards / "train-000001.tar").read_bytes()
    (shards / "train-000001.tar").unlink()
    command = words(tmp_path, shards, tmp_path / "out")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("mmrep: error: ") and "train-000001.tar" in error
    assert "Traceback" not in error
    (shards / "train-000001.tar").write_bytes(whole)
    assert main(command) == 0
    found = capsys.readouterr()
    assert "1 shards embedded, 1 were there" in found.out and "without 1 broken samples" in found.out
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [len(shard["faults"]) for shard in content["shards"]] == [1, 0]


def test_wrong_use(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(tmp_path, tiny_shards, tmp_path / "out")
    for more, message in (
        (["--engine", "rya"], "did you mean 'ray'?"),
        (["--shard-index", "0", "--num-shards", "2"], "share 0 of 2 (--shard-index); Ray shares the shards itself"),
        (["--concurrency", "0"], "give at least one worker"),
    ):
        assert main([*command, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(command) == 2
    assert "--engine ray needs Ray; pip install 'mmrep[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
