"""Shards behind a URL: the same samples as from the disk whatever the network does, or one clear error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl

from mmrep.cli import main
from mmrep.data import shard_cache
from mmrep.data.build import build_index
from mmrep.data.datamodule import ShardDataModule
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Index
from mmrep.data.plan import Plan
from mmrep.data.reader import Samples, check_shards
from mmrep.data.shard_cache import ShardCache
from mmrep.encoders import Encoder, NgramTextEncoder
from mmrep.errors import DataError
from tests.data.server import Behaviour, served
from tests.data.test_resume import fit, module
from tests.tiny import MODALITIES, write_tiny_shards

SIZES = (20, 3, 31, 9)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shards(tmp_path_factory.mktemp("remote"), {"train": SIZES, "val": (12,), "test": (8,)})


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Behaviour]]:
    monkeypatch.setattr(shard_cache, "FIRST_WAIT", 0.01)
    with served(shards) as (url, behaviour):
        yield url, behaviour


def keys(index: Index, cache: ShardCache | None, workers: int = 0, window: int = 64) -> list[list[str]]:
    """Two epochs of training keys."""
    encoders: dict[str, Encoder] = {"text": NgramTextEncoder(8, buckets=64, length=32)}
    samples = Samples(index, "train", cache)
    found = []
    for epoch in range(2):
        plan = Plan([samples.contents(["text"])], 12, 0, True, window=window)
        dataset = ShardDataset(samples, encoders, plan=plan, train=True)
        place = (epoch, 0)
        loader = make_loader(dataset, encoders, num_workers=workers, position=lambda place=place: place)
        found += [batch.keys for batch in loader]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_samples_in_spite_of_faults(
    workers: int, shards: Path, server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    url, behaviour = server
    local = keys(Index.load(shards), None, window=2)
    behaviour.faults |= {
        "train-000000.tar": ["500", "short", "500"],
        "train-000001.tar": ["wrong", "short"],
        "train-000002.tar": ["slow"],
        "index.json": ["500"],
        "members.npy": ["short"],
    }
    cache = ShardCache(tmp_path / "cache")
    assert keys(Index.load(url, cache), cache, workers, window=2) == local
    assert not any(behaviour.faults.values())
    fetched = {path: count for path, count in behaviour.requests.items() if path.endswith("train-000003.tar")}
    assert list(fetched.values()) == [1]  # once for all epochs and workers
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_run_from_a_server_equals_the_run_from_the_disk(
    shards: Path, server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    url, behaviour = server
    local, _, _ = fit(shards, tmp_path / "local")
    behaviour.faults |= {"train-000000.tar": ["500", "short"], "train-000002.tar": ["slow", "500"]}
    data = {"path": url, "cache_dir": str(tmp_path / "cache")}
    remote, _, _ = fit(shards, tmp_path / "remote", data=data, workers=1)
    assert remote.keys == local.keys and remote.pixels == local.pixels
    resumed, _, _ = fit(shards, tmp_path / "on", data=data, checkpoint=tmp_path / "local" / "step=7.ckpt")
    assert resumed.keys == local.keys[7:]  # a run that began on a disk goes on from a server


def test_the_cache_is_bounded_and_files_that_are_open_outlive_it(
    shards: Path, server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    url, behaviour = server
    cache = ShardCache(tmp_path / "cache")
    index = Index.load(url, cache)
    largest = max(shard.bytes for shard in index.shards)
    small = ShardCache(tmp_path / "cache", max_bytes=largest + 1)
    assert keys(index, small, window=2) == keys(Index.load(shards), None, window=2)
    kept = list((tmp_path / "cache").glob("*.tar"))
    assert kept and sum(path.stat().st_size for path in kept) <= largest + 1
    assert max(behaviour.requests[f"/{shard.name}"] for shard in index.shards) > 1  # dropped, and fetched again


def test_equal_shards_of_two_places_are_one_file(shards: Path, server: tuple[str, Behaviour], tmp_path: Path) -> None:
    """Names come from the digest: a/000.tar and b/000.tar are never mistaken for each other."""
    url, behaviour = server
    cache = ShardCache(tmp_path / "cache")
    shard = Index.load(shards).shards[0]
    first = cache.get(f"{url}/{shard.name}", shard.sha256, shard.bytes)
    again = cache.get(f"{url}/elsewhere/{shard.name}", shard.sha256, shard.bytes)
    assert first == again and first.read_bytes() == (shards / shard.name).read_bytes()
    assert behaviour.requests[f"/elsewhere/{shard.name}"] == 0


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["500"] * 6, r"cannot be read after 6 attempts .*500"),
        (["short"] * 6, "cannot be read after 6 attempts"),
        (["wrong"] * 6, "sha256 .* the index says"),
        (["404"], "not there"),
    ],
)
def test_what_does_not_heal_is_one_error(
    faults: list[str], message: str, shards: Path, server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    url, behaviour = server
    shard = Index.load(shards).shards[0]
    behaviour.faults[shard.name] = faults
    with pytest.raises(DataError, match=message) as caught:
        ShardCache(tmp_path / "cache").get(f"{url}/{shard.name}", shard.sha256, shard.bytes)
    assert "\n" not in str(caught.value) and shard.name in str(caught.value)
    assert not list((tmp_path / "cache").glob("*.tar")) and not list((tmp_path / "cache").glob("*.part"))


def test_more_bytes_than_declared_are_not_written(shards: Path, server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, _ = server
    shard = Index.load(shards).shards[0]
    with pytest.raises(DataError, match="more than 1000 bytes came"):
        ShardCache(tmp_path / "cache").get(f"{url}/{shard.name}", shard.sha256, 1000)


def test_no_network_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "FIRST_WAIT", 0.001)
    with pytest.raises(DataError, match="cannot be read after 6 attempts"):
        Index.load("http://127.0.0.1:9/nothing", ShardCache(tmp_path))


def test_a_scheme_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match=r"mmrep\[s3\]"):
        Index.load("s3://bucket/folder", ShardCache(tmp_path))


@pytest.mark.parametrize("place", ["pipe:cat x.tar", "file:///etc", "ssh://host/x", "pipe://x"])
def test_other_schemes_are_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no place to read shards from"):
        Index.load(place, ShardCache(tmp_path))


def test_an_index_here_of_shards_elsewhere(
    shards: Path, server: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of a server that lists nothing: named by a pattern, indexed here, read from there."""
    monkeypatch.setenv("MMREP_CACHE", str(tmp_path / "cache"))
    url, behaviour = server
    behaviour.faults["train-000001.tar"] = ["500", "short"]
    place, out = f"{url}/train-{{000000..000003}}.tar", tmp_path / "index"
    words = [f"--modality={name}={','.join(m.extensions)}" for name, m in MODALITIES.items()]
    assert main(["data", "index", place, "--out", str(out), *words]) == 0
    index = Index.load(out)
    assert index.source == url and [shard.samples for shard in index.shards] == list(SIZES)
    assert keys(index, None) == keys(Index.load(shards), None)
    assert main(["data", "check", str(out)]) == 0
    with pytest.raises(DataError, match="--out"):
        build_index(place, MODALITIES)


def test_an_index_from_elsewhere_names_no_folder_of_this_machine(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    text = (copy / "index.json").read_text()
    (copy / "index.json").write_text(text.replace('"source": null', '"source": "/etc"'))
    assert Index.load(copy).root == "/etc"
    with served(copy) as (url, _):
        assert Index.load(url, ShardCache(tmp_path / "cache")).root == url


def test_evaluation_from_a_server_gives_the_figures_of_the_disk(
    shards: Path, server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    figures = []
    for path in (str(shards), server[0]):
        run = pl.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, barebones=False
        )
        source = ShardDataModule(path, global_batch_size=5, num_workers=0, cache_dir=str(tmp_path))
        figures += run.test(module(), source, verbose=False)
    assert figures[0] == figures[1] and "test/text->image/recall@1" in figures[0]


def test_the_next_window_comes_while_the_present_one_is_read(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    url, behaviour = server
    cache = ShardCache(tmp_path / "cache")
    samples = Samples(Index.load(url, cache), "train", cache)
    encoders: dict[str, Encoder] = {"text": NgramTextEncoder(8, buckets=64, length=32)}
    plan = Plan([samples.contents(["text"])], 3, 0, True, window=1)
    dataset = ShardDataset(samples, encoders, plan=plan, train=True)
    batch = next(plan.batches(0))
    read = {samples.shard(int(number)).name for number in batch.samples}
    assert len(read) == 1
    dataset.__getitems__(batch)
    assert dataset.prefetcher._thread is not None
    dataset.prefetcher._thread.join(20)
    fetched = {name for name in (shard.name for shard in samples.shards) if behaviour.requests[f"/{name}"]}
    assert fetched == {samples.shards[shard].name for _, shard in plan.upcoming_shards(batch)} and len(fetched) == 2
    following = next(
        batch for batch in plan.batches(0) if not {samples.shard(int(n)).name for n in batch.samples} & read
    )
    dataset.__getitems__(following)
    assert max(behaviour.requests[f"/{shard.name}"] for shard in samples.shards) == 1


def test_a_copy_that_went_bad_on_the_disk_is_fetched_again(
    shards: Path, server: tuple[str, Behaviour], tmp_path: Path
) -> None:
    """A disk may change what was verified when it came: then the copy is at fault, and not the samples."""
    url, behaviour = server
    cache = ShardCache(tmp_path / "cache")
    index = Index.load(url, cache)
    local = Samples(Index.load(shards), "train")
    shard = local.shards[0]
    copy = cache.get(f"{url}/{shard.name}", shard.sha256, shard.bytes)
    copy.write_bytes(bytes(shard.bytes))
    samples = Samples(index, "train", cache)
    assert samples.read(1, "txt") == local.read(1, "txt") and behaviour.requests[f"/{shard.name}"] == 2
    copy.write_bytes(bytes(shard.bytes))
    assert all(fault is None for _, fault in check_shards(index, cache))
    assert behaviour.requests[f"/{shard.name}"] == 3
