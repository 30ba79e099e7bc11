"""Corrupt samples are replaced, counted and listed; disks that fail are asked again and then named; nothing else is hidden."""

from __future__ import annotations

import csv
import errno
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmrep.batch import Batch
from mmrep.cli import main
from mmrep.data import shard_cache
from mmrep.data.build import build_index
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.faults import FaultLog, read_quarantine
from mmrep.data.index import Index
from mmrep.data.member_table import MemberTable
from mmrep.data.order import Contents
from mmrep.data.plan import Plan
from mmrep.data.reader import Samples
from mmrep.data.scan import group_members
from mmrep.data.writer import write_shard
from mmrep.encoders import Encoder
from mmrep.errors import DataError, Fault, SampleError
from tests.data.test_resume import TOPOLOGIES, fit, on_a_rank
from tests.full_disk import errno_within
from tests.gloo_pool import GlooPool
from tests.modules.test_modules import ENCODERS
from tests.tiny import MODALITIES, sample, write_tiny_shards

SPLITS = {"train": (20, 3, 31, 9), "val": (12,), "test": (8,)}
BROKEN = {"train-0-0002": "png", "train-2-0010": "flac", "train-2-0011": "txt"}
"""Samples with a member that is damaged after the index was made."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shards(tmp_path_factory.mktemp("whole"), SPLITS)


def damage(shards: Path, broken: dict[str, str]) -> None:
    """Flip a byte in the payload of members."""
    index = Index.load(shards)
    for split in index.splits:
        samples = Samples(index, split)
        for number in range(len(samples)):
            if (extension := broken.get(samples.key(number))) is not None:
                path = shards / samples.shard(number).name
                place = dict(group_members(path))[samples.key(number)][extension]
                shard = bytearray(path.read_bytes())
                shard[place.offset + place.size // 2] ^= 1
                path.write_bytes(shard)


@pytest.fixture(scope="module")
def damaged(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shards = Path(shutil.copytree(whole, tmp_path_factory.mktemp("damaged") / "shards"))
    damage(shards, BROKEN)
    return shards


def encoders() -> dict[str, Encoder]:
    return {name: make(8) for name, make in ENCODERS.items()}


def batches(shards: Path, split: str = "train", *, train: bool = True, replace: bool = True) -> list[Batch]:
    samples = Samples(Index.load(shards), split)
    made = encoders()
    plan = Plan([samples.contents(list(made))], 12, 0, train)
    dataset = ShardDataset(samples, made, plan=plan, train=train, replace=replace)
    return list(make_loader(dataset, made))


def test_a_faulty_sample_is_replaced_by_one_of_its_modality_set_and_the_rest_stays(whole: Path, damaged: Path) -> None:
    found = []
    for clean, dirty in zip(batches(whole), batches(damaged), strict=True):
        replaced = [slot for slot in range(12) if clean.keys[slot] != dirty.keys[slot]]
        assert {clean.keys[slot] for slot in replaced} == {key for key in clean.keys if key in BROKEN}
        assert len(set(dirty.keys)) == 12  # no sample meets itself
        for name in clean.present:
            assert torch.equal(clean.present[name], dirty.present[name])
        found += dirty.faults
    assert {fault.key for fault in found} <= set(BROKEN) and len(found) >= 2
    for fault in found:
        kind = {"png": "image", "flac": "audio", "txt": "text"}[BROKEN[fault.key]]
        assert (fault.modality, fault.reason) == (kind, "checksum") and "checksum differs" in fault.detail


def test_replacements_are_the_same_on_any_ranks_and_workers_and_after_a_resume(
    damaged: Path, tmp_path: Path, pool2: GlooPool, pool4: GlooPool
) -> None:
    data = {"max_bad_fraction": 0.1}
    found = {}
    for world, workers in TOPOLOGIES:
        options = {"shards": damaged, "folder": tmp_path / f"{world}-{workers}", "data": data, "max_epochs": 2}
        pool = {2: pool2, 4: pool4}.get(world)
        arguments = [(rank, world, workers, options) for rank in range(world)]
        shares = [on_a_rank(*arguments[0])] if pool is None else pool.run(on_a_rank, arguments, timeout=90)
        found[world, workers] = [
            [key for part in parts for key in part] for parts in zip(*(keys for keys, _ in shares), strict=True)
        ]
    assert all(seen == found[1, 0] for seen in found.values())
    assert not {key for keys in found[1, 0] for key in keys} & set(BROKEN)
    resumed, _, _ = fit(damaged, tmp_path / "on", checkpoint=tmp_path / "1-0" / "step=3.ckpt", data=data, max_epochs=2)
    assert resumed.keys == found[1, 0][3:]


def test_faults_are_listed_once_and_bounded(damaged: Path, tmp_path: Path) -> None:
    quarantine = tmp_path / "quarantine.csv"
    fit(damaged, tmp_path / "a", data={"max_bad_fraction": 0.1, "quarantine": str(quarantine)})
    with quarantine.open() as file:
        listed = [(row["shard"], row["key"], row["reason"]) for row in csv.DictReader(file)]
    assert sorted(key for _, key, _ in listed) == sorted(BROKEN)  # three epochs, each once
    assert all(shard.startswith("train-00000") and reason == "checksum" for shard, _, reason in listed)
    with pytest.raises(DataError, match=r"samples cannot be used, more than the 1 of data.max_bad_fraction=0.001"):
        fit(damaged, tmp_path / "b")


def too_many(rank: int, shards: str) -> str:
    try:
        on_a_rank(
            rank, 2, 0, {"shards": Path(shards), "folder": Path(shards) / "run", "data": {"max_bad_fraction": 0.02}}
        )
    except DataError as error:
        return str(error)
    return "nothing"


def test_ranks_add_up_their_faults_and_stop_together(
    damaged: Path, pool2: GlooPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three faulty samples no rank need meet more than two, which are allowed; together they are too many."""
    messages = pool2.run(too_many, [(rank, str(damaged)) for rank in range(2)], timeout=90)
    assert all(message.startswith("3 samples cannot be used, more than the 2") for message in messages), messages


def test_validation_leaves_out_and_evaluation_refuses(damaged: Path, whole: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(whole, tmp_path / "shards"))
    damage(shards, {"val-0-0003": "txt", "test-0-0002": "txt"})
    (batch,) = batches(shards, "val", train=False)
    clean = batches(whole, "val", train=False)[0]
    slot = next(slot for slot in range(12) if batch.keys[slot] == "")
    assert clean.keys[slot] == "val-0-0003" and not any(present[slot] for present in batch.present.values())
    assert [fault.key for fault in batch.faults] == ["val-0-0003"]
    with pytest.raises(SampleError, match=r"checksum differs \[test-000000\.tar:test-0-0002\]"):
        batches(shards, "test", train=False, replace=False)


def test_a_rotten_dataset_ends_with_one_error(tmp_path: Path) -> None:
    samples = [{"__key__": f"k{i:03d}", "png": b"no picture"} for i in range(40)]
    write_shard(tmp_path / "train-0.tar", samples)
    build_index(tmp_path, {"image": MODALITIES["image"]}).save()
    source = Samples(Index.load(tmp_path), "train")
    made = {"image": encoders()["image"]}
    dataset = ShardDataset(source, made, plan=Plan([source.contents(["image"])], 8, 0, True), train=True, replace=True)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"no spare: 33 in a row cannot be used, the first: image \.png") as caught:
            list(make_loader(dataset, made, num_workers=workers))
        assert "\n" not in str(caught.value)  # as it was raised in the worker, not its traceback


def test_the_command_lists_faults_in_the_run_folder_and_a_new_index_leaves_them_out(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from tests.test_cli import CONFIG

    shards = Path(shutil.copytree(damaged, tmp_path / "shards"))
    data = {"path": str(shards), "global_batch_size": 12, "num_workers": 0}
    config = {**CONFIG, "data": {**data, "max_bad_fraction": 0.1}, "runs": str(tmp_path / "runs")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    fit_it = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.max_epochs=1"]
    assert main([*fit_it, "--name", "a"]) == 0
    quarantine = tmp_path / "runs" / "a" / "quarantine.csv"
    first = {fault.key for fault in read_quarantine(quarantine)}
    assert first and first <= set(BROKEN)
    assert "quarantine: null" in (tmp_path / "runs" / "a" / "config.yaml").read_text()
    with (tmp_path / "runs" / "a" / "metrics.csv").open() as file:
        counted = [float(row["train/faults"]) for row in csv.DictReader(file) if row.get("train/faults")]
    assert counted == sorted(counted) and counted[-1] == len(first)
    assert main([*fit_it, "--name", "b", "--data.max_bad_fraction", "0"]) == 2
    assert "quarantine.csv" in capsys.readouterr().err
    fingerprint = Index.load(shards).fingerprint
    assert main(["data", "index", str(shards), "--exclude", str(quarantine)]) == 0
    index = Index.load(shards)
    assert index.fingerprint != fingerprint and len(Samples(index, "train")) == sum(SPLITS["train"]) - len(first)


def flaky(monkeypatch: pytest.MonkeyPatch, failures: int, kind: str) -> list[int]:
    """Make every read fail some times before it works."""
    real, left, calls = os.pread, {}, []

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        calls.append(offset)
        left.setdefault((offset, size), failures)
        if left[offset, size] > 0:
            left[offset, size] -= 1
            if kind == "error":
                raise OSError(errno.EIO, "Input/output error")
            if kind == "empty":
                return b""
            return real(descriptor, max(1, size // 3), offset)
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(shard_cache, "FIRST_WAIT", 0.0)
    return calls


@pytest.mark.parametrize("kind", ["error", "empty", "short"])
def test_disks_are_asked_again(kind: str, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = batches(whole)
    flaky(monkeypatch, 2, kind)
    for one, other in zip(expected, batches(whole), strict=True):
        assert one.keys == other.keys and not other.faults
        assert torch.equal(one.inputs["image"], other.inputs["image"])  # type: ignore[arg-type]  # a tensor, no list


@pytest.mark.parametrize("kind", ["error", "empty"])
def test_a_disk_that_fails_for_good_is_one_error_and_no_replacement(
    kind: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky(monkeypatch, 1000, kind)
    with pytest.raises(DataError, match=r"cannot be read after 6 attempts .*train-00000\d\.tar") as caught:
        batches(whole)
    assert not isinstance(caught.value, SampleError)


def test_what_is_no_fault_of_the_data_is_not_swallowed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmrep.data.dataset as module

    for error in (MemoryError("out"), ImportError("no codec"), AssertionError("a bug")):

        def fail(*_: Any, error: BaseException = error) -> Any:
            raise error

        monkeypatch.setattr(module, "decode", fail)
        with pytest.raises(type(error)):
            batches(whole)


def test_an_error_in_a_transform_says_of_which_sample(whole: Path) -> None:
    samples, made = Samples(Index.load(whole), "train"), encoders()
    dataset = ShardDataset(samples, made, train=True)

    def fail(_: Any) -> Any:
        raise ZeroDivisionError

    dataset.transforms["image"] = fail
    with pytest.raises(ZeroDivisionError) as caught:
        dataset[0]
    assert caught.value.__notes__ == ["while preparing 'image' of train-000000.tar:train-0-0000"]


def test_the_log_counts_a_sample_once_also_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "quarantine.csv"
    fault = Fault("a.tar", "0" * 64, 'k"1', "image", "checksum", "differs, really")
    log = FaultLog(path, 1000, 0.001)
    log.add([fault, fault])
    log.check_over_ranks("cpu")
    again = FaultLog(path, 1000, 0.001)
    again.add([fault, Fault("a.tar", "0" * 64, "k2", "image", "undecodable", "")])
    assert [found.key for found in read_quarantine(path)] == ['k"1', "k2"]
    with pytest.raises(DataError, match=r"2 samples .* the 1 of .* \(a\.tar: 1 checksum; a\.tar: 1 undecodable\)"):
        again.check_over_ranks("cpu")
    again.add([replace(fault, sha256="1" * 64)])  # another dataset, whose shards are named alike
    assert len(read_quarantine(path)) == 3
    with pytest.raises(DataError, match="3 samples"):
        again.check_over_ranks("cpu")
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match="no quarantine file"):
        read_quarantine(tmp_path / "other.csv")


def rank_counts(rank: int, world: int, epochs: int) -> list[int]:
    """What the limit is compared with after each epoch, of which every rank meets another share."""
    log, plan, broken, found = (
        FaultLog(None, 400, 0.01),
        Plan([Contents.uniform([100] * 4)], 16, 0, True),
        {7, 99, 302},
        [],
    )
    for epoch in range(epochs):
        for batch in plan.batches(epoch, 0, rank, world):
            met = broken.intersection(batch.samples.tolist())
            log.add([Fault("a.tar", "0", str(number), "image", "checksum", "") for number in sorted(met)])
        log.check_over_ranks("cpu")
        found.append(len(log.met_by_all))
    return found


def test_a_sample_that_several_ranks_meet_counts_once(pool2: GlooPool, pool4: GlooPool) -> None:
    assert rank_counts(0, 1, 6) == [3] * 6
    for pool in (pool2, pool4):
        assert pool.run(rank_counts, [(rank, pool.world, 6) for rank in range(pool.world)]) == [[3] * 6] * pool.world


PAIRS = [sample(f"{i:03d}", i) for i in range(24)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["flip", "cut", "zero", "swap"]), before=st.booleans())
def test_every_tuple_that_comes_out_went_in(seed: int, kind: str, before: bool, tmp_path: Path) -> None:
    """Damage before the index is made, or after: what is read are original members of one sample, or an error."""
    rng = random.Random(seed)
    folder = tmp_path / str(seed) / kind / str(before)
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((PAIRS[:12], PAIRS[12:])):
        write_shard(folder / f"train-{number}.tar", part)
    path = folder / f"train-{rng.randrange(2)}.tar"
    if not before:
        build_index(folder, MODALITIES).save()
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if kind == "cut":
        del data[place:]
    elif kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        data[place // 512 * 512 : place // 512 * 512 + 1024] = bytes(1024)
    else:
        other = rng.randrange(len(data) // 512) * 512
        one = place // 512 * 512
        data[one : one + 512], data[other : other + 512] = data[other : other + 512], data[one : one + 512]
    path.write_bytes(data)
    try:
        if before:
            build_index(folder, MODALITIES).save()
        samples = Samples(Index.load(folder), "train")
    except DataError:
        return
    original = {members["__key__"]: members for members in PAIRS}
    columns = [samples.columns(name) for name in MODALITIES]
    for number, found in enumerate(samples.read_many(np.arange(len(samples)), columns)):
        expected = original.get(samples.key(number))
        for stored in found:
            if stored is not None and not isinstance(stored, SampleError) and not before:
                extension, content = stored
                assert expected is not None
                wanted = expected[extension]
                assert content == (wanted.encode() if isinstance(wanted, str) else wanted)


def bounded_log(path: Path, size: int) -> tuple[list[int], str]:
    """In a process whose files may have ``size`` bytes: three faults; the size of the file after each, and what is said."""
    sys.stderr = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    log, sizes = FaultLog(path, 100, 0.5), []
    for number in range(3):
        log.add([Fault("a.tar", "0", f"key {number}", "txt", "checksum", "differs")])
        sizes.append(path.stat().st_size)
    assert log.counts.total() == 3, "they count"
    return sizes, sys.stderr.getvalue()


@pytest.mark.parametrize("room", [10, 100])
def test_a_full_disk_loses_lines_of_the_quarantine_and_no_run(room: int, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        sizes, said = pool.apply(bounded_log, (tmp_path / "quarantine.csv", room))
    kept = read_quarantine(tmp_path / "quarantine.csv")
    assert [fault.key for fault in kept] == [f"key {number}" for number in range(len(kept))], "whole lines or none"
    assert max(sizes) <= room and len(kept) == (0 if room == 10 else 1)
    assert said.count("corrupt samples cannot be listed") == 1


@pytest.mark.parametrize("length", [4000, 50000])
def test_a_full_disk_cuts_no_array_of_an_index(length: int, tmp_path: Path) -> None:
    """Neither the last bytes, which do not fill a buffer, nor many of them."""
    table = MemberTable.build([("k" * length, {})], ["txt"])
    assert errno_within(4096, lambda: table.save(tmp_path / "table"), tmp_path / "log") == errno.EFBIG
    table.save(tmp_path / "table")
    assert MemberTable.load(tmp_path / "table", ["txt"]).key(0) == "k" * length
