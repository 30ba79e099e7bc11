"""Embedding shards: the rows are the model's, finished shards are kept, many processes share, nothing is lost silently."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrep.cli.embed import run
from mmrep.data.build import build_index
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.order import Contents
from mmrep.data.reader import Samples
from mmrep.data.writer import write_shard
from mmrep.errors import ConfigError, DataError, MmrepError
from mmrep.search import EmbeddingIndex, EmbeddingJob
from mmrep.search.shard_plan import ShardPlan
from tests.gloo_pool import GlooPool
from tests.search.conftest import embed, small
from tests.tiny import MODALITIES, file_bytes, sample


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_rows_are_what_the_model_gives_each_sample_alone(embedded: Path, tiny_shards: Path) -> None:
    index, data = EmbeddingIndex.load(embedded), Index.load(tiny_shards)
    samples = [Samples(data, split) for split in data.splits]
    assert len(index) == sum(map(len, samples)) == 88
    for name, extension, kind in (("image", "png", "image"), ("text", "txt", "text"), ("audio", "flac", "audio")):
        expected, places = [], []
        for place, (part, number) in enumerate((split, n) for split in samples for n in range(len(split))):
            if part.has(number, extension):
                raw = decode(kind, extension, part.read(number, extension), "here")
                expected.append(small().encode(**{name: [raw]})[name])
                places.append(place)
        numbers = torch.cat([numbers for numbers, _, _ in index.tiles(name)])
        rows = torch.cat([rows for _, rows, _ in index.tiles(name)])
        assert numbers.tolist() == places and index.count(name) == len(places) < 88
        assert torch.allclose(rows, torch.cat(expected), atol=1e-5)


def test_the_manifest_says_what_it_is_and_names_every_file(embedded: Path) -> None:
    content = json.loads((embedded / "manifest.json").read_text())
    assert content["format"] == "mmrep-embeddings-1" and content["source"]["embed_dim"] == 16
    assert content["source"]["modalities"] == {"image": "image", "text": "text", "audio": "audio"}
    assert [shard["rows"] for shard in content["shards"]] == [13, 7, 20, 28, 20]
    named = {name for shard in content["shards"] for name in shard["files"]}
    below = {path.relative_to(embedded).as_posix() for path in (embedded / "rows").rglob("*") if path.is_file()}
    assert below - named == {f"rows/{shard['name'].removesuffix('.tar')}.json" for shard in content["shards"]}
    assert str(embedded.parent) not in json.dumps(content), "no place of this machine"


@pytest.mark.parametrize("file_format", ["npy", "parquet"])
def test_finished_shards_are_kept_and_damaged_ones_made_anew(
    tiny_shards: Path, tmp_path: Path, file_format: str
) -> None:
    out = tmp_path / "out"
    embed(small(), tiny_shards, out, file_format=file_format)
    before, contents = times(out), file_bytes(out)
    job, manifest = embed(small(), tiny_shards, out, file_format=file_format)
    assert not job.pending and job.kept == 5 and manifest is not None and times(out) == before
    files = sorted(out.glob("rows/train-000001*"))
    record = next(path for path in files if path.suffix == ".json")
    data = next(
        path for path in (*files, *out.glob("rows/train-000001/image.npy")) if path.suffix in (".npy", ".parquet")
    )
    whole = data.read_bytes()
    for damage in (whole[:-9], whole[:-9] + b"\x55" * 9, b""):
        data.write_bytes(damage)
        job, manifest = embed(small(), tiny_shards, out, file_format=file_format)
        assert [shard.name for shard in job.pending] == ["train-000001.tar"] and manifest is not None
        assert file_bytes(out) == contents
    for content in ("", "[]", '{"rows": 1}', json.dumps(json.loads(record.read_text()) | {"source": "another"})):
        record.write_text(content)  # a record that was cut short, or is of another source
        job, _ = embed(small(), tiny_shards, out, file_format=file_format)
        assert len(job.pending) == 1 and file_bytes(out) == contents
    unchanged = {name: time for name, time in before.items() if "train-000001" not in name}
    assert {name: time for name, time in times(out).items() if name in unchanged} == unchanged


def test_a_job_that_dies_in_the_middle_goes_on_from_there(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = EmbeddingJob(small(), Index.load(tiny_shards), out, data=str(tiny_shards))

    def dies(count: int, done: list[int] = []) -> None:  # noqa: B006 - it remembers
        done.append(count)
        if sum(done) > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(batch_size=9, advance=dies)
    assert job.finish() is None
    with pytest.raises(DataError, match=r"not finished .*again"):
        EmbeddingIndex.load(out)
    killed, alive = (out / "rows" / f"train-000001.{name}.part" for name in ("0123456789ab", "ba9876543210"))
    killed.mkdir()
    alive.mkdir()
    os.utime(killed, (0, 0))
    job, manifest = embed(small(), tiny_shards, out)
    assert job.kept == 2 and len(job.pending) == 3 and manifest is not None
    assert not killed.exists() and alive.exists(), "what another process may be writing stays"
    embed(small(), tiny_shards, tmp_path / "at once")
    assert file_bytes(out) == file_bytes(tmp_path / "at once")


def test_many_processes_share_the_shards(tiny_shards: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "out", []
    for worker in (2, 0, 1):
        job, manifest = embed(small(), tiny_shards, out, worker=worker, workers=3)
        found.append((len(job.pending), manifest is not None))
    assert found == [(1, False), (2, False), (2, True)]
    embed(small(), tiny_shards, tmp_path / "alone")
    assert file_bytes(out) == file_bytes(tmp_path / "alone")


def test_another_source_for_the_same_folder_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(small(), tiny_shards, out, splits=["val"])
    before = file_bytes(out)
    other = Path(shutil.copytree(tiny_shards, tmp_path / "other"))
    (other / "train-000001.tar").unlink()
    build_index(other, MODALITIES, group_key="label").save()
    for what, job in (
        ("another model", {"model": small(seed=1)}),
        ("another data", {"shards": other}),
        ("another splits", {"splits": ["test"]}),
        ("another modalities", {"modalities": ["image"]}),
        ("another format", {"file_format": "parquet"}),
    ):
        settings = {"model": small(), "shards": tiny_shards, "splits": ["val"], **job}
        with pytest.raises(ConfigError, match=f"{what}.*--out") as caught:
            embed(settings.pop("model"), settings.pop("shards"), out, **settings)
        assert "\n" not in str(caught.value) and file_bytes(out) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no embeddings"):
        embed(small(), tiny_shards, tmp_path)


def test_broken_samples_are_left_out_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    samples = [sample(f"k{number:02d}", number) for number in range(12)]
    samples[2]["png"], samples[9]["flac"] = b"\x89PNG no picture", b"fLaC no sound"
    write_shard(shards / "train-000000.tar", samples[:10])
    write_shard(shards / "train-000001.tar", [{"__key__": "all", "png": b"broken"}])
    write_shard(shards / "train-000002.tar", samples[10:])
    build_index(shards, MODALITIES).save()
    small().save_pretrained(tmp_path / "model")
    words = ["embed", "--checkpoint", str(tmp_path / "model"), "--data", str(shards), "--out", str(tmp_path / "out")]
    assert run([*words, "--batch-size", "4", "--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert "complete: 10 samples in 3 shards, without 3 broken samples" in output.out
    assert "left out: train-000000.tar:k02: image .png" in output.err and "train-000001.tar:all" in output.err
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    faults = [[fault["key"] for fault in shard["faults"]] for shard in content["shards"]]
    assert faults[0][0] == "k02" and faults[1] == ["all"] and faults[2] == []
    index = EmbeddingIndex.load(tmp_path / "out")
    row = small().encode(text=["a yellow thing 2"])  # number 11
    hit = index.search(row, target="image", k=20).hits[0]
    assert {found.key for found in hit} & {"k02", "all"} == set()
    assert {found.key: found.number for found in hit}["k04"] == 4, "numbers count the broken ones"


def test_wrong_use_is_one_line(tiny_shards: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"modalities": ["imgae"]}, "did you mean 'image'"),
        ({"splits": ["vla"]}, "did you mean 'val'"),
        ({"file_format": "parket"}, "did you mean 'parquet'"),
        ({"worker": 3, "workers": 3}, "counts from 0"),
    ):
        with pytest.raises(MmrepError, match=message) as caught:
            embed(small(), tiny_shards, tmp_path / "out", **settings)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_modality_whose_rows_would_take_another_place(tiny_shards: Path, tmp_path: Path) -> None:
    for name in ("key", "number"):
        model = small(share={name: "text"})
        with pytest.raises(MmrepError, match=f"parquet cannot hold a modality whose rows are named '{name}'") as caught:
            embed(model, tiny_shards, tmp_path / "out", file_format="parquet")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        assert embed(model, tiny_shards, tmp_path / name, file_format="parquet", modalities=["text"])[1] is not None


def test_some_modalities_of_some_splits(tiny_shards: Path, tmp_path: Path) -> None:
    _, manifest = embed(small(), tiny_shards, tmp_path / "out", splits=["test", "val"], modalities=["image"])
    assert manifest is not None and [record.name for record in manifest.shards] == [
        *("test-000000.tar", "test-000001.tar", "val-000000.tar"),
    ]
    index = EmbeddingIndex.load(tmp_path / "out")
    assert index.modalities == ("image",) and len(index) == 40
    assert len(index.search(index.model.encode(text=["red"]), target="image", k=3).hits[0]) == 3
    with pytest.raises(MmrepError, match="no 'audio' was embedded"):
        index.search(index.model.encode(text=["red"]), target="audio")
    assert np.load(tmp_path / "out" / "rows" / "val-000000" / "image.npy").dtype == np.float32


def test_batches_end_where_shards_end() -> None:
    contents = Contents(np.array([[5, 0], [0, 0], [2, 2], [3, 0]]), (1, 3), None)  # type: ignore[arg-type]  # not asked
    plan = ShardPlan([contents], 4, seed=0, train=False)
    batches = [batch.samples.tolist() for batch in plan.batches(0)]
    assert batches == [[0, 1, 2, 3], [4, -1, -1, -1], [5, 6, 7, 8], [9, 10, 11, -1]] and plan.num_batches == 4
    assert [plan.batches_of(int(size)) for size in plan.sizes] == [2, 0, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(tiny_shards: Path, tmp_path: Path, num_workers: int) -> None:
    embed(small(), tiny_shards, tmp_path / "expected")
    job = EmbeddingJob(small(), Index.load(tiny_shards), tmp_path / "out", data=str(tiny_shards))
    assert job.run(batch_size=9, num_workers=num_workers) == [] and job.finish() is not None
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "expected")


def embed_at_once(rank: int, shares: bool, shards: Path, out: Path) -> bool:
    """One of several processes that begin at the same moment."""
    torch.distributed.barrier()
    worker, workers = (rank, 3) if shares else (0, 1)
    _, manifest = embed(small(), shards, out, worker=worker, workers=workers)
    torch.distributed.barrier()
    return manifest is not None


@pytest.mark.parametrize("shares", [True, False])
def test_processes_may_begin_at_once_and_do_the_same_work(
    shares: bool, tiny_shards: Path, tmp_path: Path, pool3: GlooPool
) -> None:
    """As a job array does; and by mistake, all with one share."""
    embed(small(), tiny_shards, tmp_path / "alone")
    expected = file_bytes(tmp_path / "alone")
    for attempt in range(4):
        out = tmp_path / f"out{attempt}"
        finished = pool3.run(embed_at_once, [(rank, shares, tiny_shards, out) for rank in range(3)], timeout=90)
        assert any(finished) and file_bytes(out) == expected


def test_a_split_that_is_named_twice_is_one(tiny_shards: Path, tmp_path: Path) -> None:
    embed(small(), tiny_shards, tmp_path / "out", splits=["val", "val"])
    job, _ = embed(small(), tiny_shards, tmp_path / "out", splits=["val"])
    assert not job.pending
