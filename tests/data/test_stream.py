"""A stream without an index: equal steps for all ranks, original tuples or one error, nothing that is believed unseen."""

from __future__ import annotations

import csv
import io
import multiprocessing
import random
import re
import tarfile
import threading
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrep.batch import Batch
from mmrep.cli import main
from mmrep.data import shard_cache
from mmrep.data.datamodule import ShardDataModule, Source
from mmrep.data.stream import Stream, StreamDataset, StreamLoader
from mmrep.data.tar_stream import read_shard
from mmrep.data.writer import write_shard
from mmrep.encoders import ConvImageEncoder, Encoder, MelAudioEncoder, NgramTextEncoder
from mmrep.errors import ConfigError, DataError
from tests.data.server import served
from tests.data.test_resume import fit
from tests.data.test_resume import on_a_rank as train_on_a_rank
from tests.gloo_pool import GlooPool
from tests.tiny import COLOURS, damaged, png, write_tiny_shards

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__` defined.*"),
    pytest.mark.filterwarnings("ignore:.*worker processes in total.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*dirpath has changed.*"),
    pytest.mark.filterwarnings("ignore:.*Total length of `list` across ranks is zero.*"),
]

MODALITIES = {"image": ["png", "jpg"], "text": ["txt"]}
EXTENSIONS = frozenset({"png", "txt"})
TINY = {"image": ["png"], "text": ["txt"], "audio": ["flac"]}


def encoders() -> dict[str, Encoder]:
    return {
        "image": ConvImageEncoder(8, image_size=8, width=8),
        "text": NgramTextEncoder(8, buckets=64, length=32),
    }


def pairs(first: int, count: int) -> list[dict[str, Any]]:
    """Samples whose picture and text both tell their number."""
    return [
        {"__key__": f"k{n:04d}", "png": png((n % 250, n // 250, 7), size=4, noise=n), "txt": f"number {n:04d}"}
        for n in range(first, first + count)
    ]


def write_pairs(folder: Path, sizes: tuple[int, ...]) -> Path:
    first = 0
    for shard, size in enumerate(sizes):
        write_shard(folder / f"s-{shard:03d}.tar", pairs(first, size))
        first += size
    return folder


def loader(place: Path | str, workers: int = 0, rank: int = 0, world: int = 1, **options: Any) -> StreamLoader:
    position = options.pop("position", (0, 0))
    settings = {"modalities": MODALITIES, "batches_per_epoch": 5, "shuffle_buffer": 20, **options}
    dataset = StreamDataset(
        str(place), Stream(**settings), encoders(), global_batch_size=8, seed=3, rank=rank, world=world
    )
    return StreamLoader(dataset, workers, lambda: position)


def on_a_rank(place: str, workers: int, rank: int, world: int) -> list[list[str]]:
    # The pool's processes are daemons, which may have no loader workers as children otherwise.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    return [batch.keys for batch in loader(place, workers, rank, world)]


class _Export(SimpleHTTPRequestHandler):
    """As a live export: the body ends where the connection does, and there are neither ranges, nor HEAD, nor lengths."""

    def __init__(self, *args: Any, cut: int | None = None, asked: list[str], **kwargs: Any) -> None:
        self.cut, self.asked = cut, asked
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = Path(self.translate_path(self.path))
        if "Range" in self.headers or not path.is_file():
            self.send_error(416 if path.is_file() else 404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(path.read_bytes()[: self.cut])

    def do_HEAD(self) -> None:
        self.send_error(405)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def exported(folder: Path, cut: int | None = None) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = partial(_Export, directory=str(folder), cut=cut, asked=asked)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("uneven"), (30, 1, 0, 9, 3))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2), (1, 3)])
def test_shards_of_any_size_give_every_rank_the_same_number_of_batches(
    world: int, workers: int, uneven: Path, pool2: GlooPool
) -> None:
    if world == 1:
        found = [on_a_rank(str(uneven), workers, 0, 1)]
    else:
        found = pool2.run(on_a_rank, [(str(uneven), workers, rank, world) for rank in range(world)], timeout=90)
    assert [[len(keys) for keys in batches] for batches in found] == [[8 // world] * 5] * world
    assert len({str(batches) for batches in found}) == world
    again = (
        [on_a_rank(str(uneven), workers, 0, 1)]
        if world == 1
        else pool2.run(on_a_rank, [(str(uneven), workers, rank, world) for rank in range(world)], timeout=90)
    )
    assert again == found


def test_two_ranks_train_from_a_live_export_in_equal_steps(tmp_path: Path, pool2: GlooPool) -> None:
    shards = write_tiny_shards(tmp_path / "shards", {"train": (20, 3, 31, 9), "val": (12,), "test": (8,)})
    stream = Stream(TINY, batches_per_epoch=5, shuffle_buffer=16)
    with exported(shards) as (url, asked):
        data = {"stream": stream, "path": f"{url}/train-{{000000..000003}}.tar"}
        options = {"shards": shards, "folder": tmp_path / "runs", "data": data, "max_epochs": 2}
        found = pool2.run(train_on_a_rank, [(rank, 2, 1, options) for rank in range(2)], timeout=90)
    (first, _), (second, _) = found
    assert [len(keys) for keys in first] == [len(keys) for keys in second] == [6] * 10 and first != second
    assert first[:5] != first[5:]
    assert len(set(asked)) == 4
    local = {**options, "data": {"stream": stream, "path": str(shards / "train-*.tar")}}
    assert pool2.run(train_on_a_rank, [(rank, 2, 1, local) for rank in range(2)], timeout=90) == found


def inputs(batches: list[Batch]) -> list[tuple[list[str], list[float]]]:
    return [(batch.keys, [float(tensor.double().sum()) for tensor in tensors(batch)]) for batch in batches]


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [value for value in batch.inputs.values() if isinstance(value, torch.Tensor)]


def test_the_same_seed_and_epoch_give_the_same_batches_and_others_do_not(uneven: Path) -> None:
    whole = inputs(list(loader(uneven)))
    assert inputs(list(loader(uneven))) == whole and len({key for keys, _ in whole for key in keys}) > 20
    assert inputs(list(loader(uneven, position=(1, 0)))) != whole
    rest = inputs(list(loader(uneven, position=(0, 2))))
    assert len(rest) == 3 and rest != whole[2:] and rest != whole[:3]
    assert len(list(loader(uneven, workers=2, position=(0, 2)))) == 3


def test_every_sample_comes_with_its_own_text(uneven: Path) -> None:
    original = {sample["__key__"]: sample for sample in pairs(0, 43)}
    texts = {key: encoders()["text"].preprocess(True)(sample["txt"]) for key, sample in original.items()}
    batches = list(loader(uneven, batches_per_epoch=20))
    for batch in batches:
        text = batch.inputs["text"]
        assert isinstance(text, torch.Tensor) and all(present.all() for present in batch.present.values())
        assert all(torch.equal(text[row], texts[key]) for row, key in enumerate(batch.keys))  # type: ignore[arg-type]
    assert {key for batch in batches for key in batch.keys} == set(original)


def test_lightning_trains_from_a_stream_and_goes_on_with_fresh_draws(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path / "shards", {"train": (20, 3, 31, 9), "val": (12,), "test": (8,)})
    data = {"stream": Stream(TINY, batches_per_epoch=4, shuffle_buffer=16), "path": str(shards / "train-*.tar")}
    with_val: dict[str, Any] = {"limit_val_batches": 1.0}
    whole, _, run = fit(shards, tmp_path / "whole", data={**data, "eval_path": str(shards)}, max_epochs=2, **with_val)
    assert len(whole.keys) == 8 and "val/text->image/recall@1" in run.callback_metrics
    assert whole.keys[:4] != whole.keys[4:]
    alone, _, _ = fit(shards, tmp_path / "alone", data=data, max_epochs=2, **with_val)
    assert alone.keys == whole.keys
    with pytest.warns(UserWarning, match="the rest of epoch 0 is drawn anew"):
        on, _, _ = fit(shards, tmp_path / "on", data=data, checkpoint=tmp_path / "alone" / "step=3.ckpt", max_epochs=2)
    assert len(on.keys) == 5 and on.keys[0] != whole.keys[3] and on.keys[1:] == whole.keys[4:]
    between, _, _ = fit(
        shards, tmp_path / "two", data=data, checkpoint=tmp_path / "alone" / "step=4.ckpt", max_epochs=2
    )
    assert between.keys == whole.keys[4:]


def _figures(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv but for what a clock says."""
    clock = ("train/samples_per_second", "train/data_wait_share")
    with (run / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in clock} for row in csv.DictReader(file)]


def test_the_command_line_trains_from_a_stream_and_says_what_evaluation_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_pairs(tmp_path, (12, 9))
    config = tmp_path / "stream.yaml"
    config.write_text(
        f"""
model:
  class_path: mmrep.modules.PairwiseCLIP
  init_args:
    embed_dim: 8
    encoders:
      image: {{class_path: mmrep.encoders.ConvImageEncoder, init_args: {{image_size: 8, width: 8}}}}
      text: {{class_path: mmrep.encoders.NgramTextEncoder, init_args: {{width: 8, buckets: 64, length: 16}}}}
data:
  path: {shards}/s-*.tar
  global_batch_size: 4
  num_workers: 0
  stream: {{modalities: {{image: [png], text: [txt]}}, batches_per_epoch: 2, shuffle_buffer: 8}}
trainer: {{max_epochs: 2, accelerator: cpu, log_every_n_steps: 1}}
"""
    )
    common = ["--config", str(config), "--runs", str(tmp_path / "runs")]
    assert main(["fit", *common, "--name", "a"]) == 0
    with (tmp_path / "runs" / "a" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["train/loss"]] == ["0", "1", "2", "3"]
    again = ["--config", str(tmp_path / "runs" / "a" / "config.yaml"), "--runs", str(tmp_path / "runs")]
    assert main(["fit", *again, "--name", "c"]) == 0
    assert _figures(tmp_path / "runs" / "a") == _figures(tmp_path / "runs" / "c")
    capsys.readouterr()
    assert main(["test", *common, "--name", "a"]) == 2
    assert "give data.eval_path" in capsys.readouterr().err
    assert main(["fit", *common, "--name", "b", "--data.path", "pipe:touch x"]) == 2
    assert "'pipe:' is no place to read shards from" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "b").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "zero"])
def test_damage_never_mispairs(damage: str, tmp_path: Path) -> None:
    """Whatever happens to a shard, what comes out before its error are original members under their own key."""
    original = {sample["__key__"]: {e: _bytes(sample[e]) for e in EXTENSIONS} for sample in pairs(1, 12)}
    write_shard(tmp_path / "whole.tar", pairs(1, 12))
    whole = (tmp_path / "whole.tar").read_bytes()
    rng, refused, errors = random.Random(0), 0, 0
    for _ in range(300):
        path = tmp_path / "broken.tar"
        path.write_bytes(damaged(whole, damage, rng))
        found = []
        try:
            for sample in read_shard(str(path), path.name, EXTENSIONS):
                found.append(sample)
        except DataError as error:
            refused += "broken.tar" in str(error) and "\n" not in str(error)
            errors += 1
        else:
            assert len(found) == 12
        for sample in found:
            assert sample.keys() >= EXTENSIONS
            for extension in EXTENSIONS:
                ours, theirs = sample[extension], original[sample["__key__"]][extension]
                different = sum(one != other for one, other in zip(ours, theirs, strict=True))
                assert different <= {"cut": 0, "flip": 1, "zero": 512}[damage]  # payloads have no checksum
    assert errors == refused > {"cut": 200, "flip": 50, "zero": 100}[damage]


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def test_the_cut_tail_of_a_shard_is_not_completed_by_the_next_one(tmp_path: Path) -> None:
    write_shard(tmp_path / "s-000.tar", pairs(0, 2))
    write_shard(tmp_path / "s-001.tar", [{**pairs(5, 1)[0], "__key__": "k0001"}])
    whole = (tmp_path / "s-000.tar").read_bytes()
    (tmp_path / "s-000.tar").write_bytes(whole[: whole.rindex(b"k0001.txt")])
    with pytest.raises(DataError, match=r"ends in the middle of a block.*s-000.tar"):
        list(loader(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_breaks_off_ends_the_run_with_one_error(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "FIRST_WAIT", 0.01)
    write_pairs(tmp_path, (40,))
    cut = (tmp_path / "s-000.tar").stat().st_size // 2 + 100
    with exported(tmp_path, cut) as (url, _), pytest.raises(DataError, match=r"ends in the middle.*s-000.tar"):
        list(loader(f"{url}/s-000.tar", workers))
    with served(tmp_path) as (url, behaviour):  # which declares a length
        behaviour.faults["s-000.tar"] = ["short"] * 9
        with pytest.raises(DataError, match=r"broke off after \d+ bytes.*s-000.tar.*last checkpoint"):
            list(loader(f"{url}/s-000.tar", workers))
        behaviour.faults["s-000.tar"] = ["500", "500"]  # opening is tried again
        assert len(list(loader(f"{url}/s-000.tar", workers))) == 5
        with pytest.raises(DataError, match=r"none\.tar"):
            list(loader(f"{url}/none.tar"))


def tar_of(path: Path, *members: tuple[str, bytes], size: int | None = None, **fields: Any) -> Path:
    """A tar of members, the last of which declares ``size`` and has further header fields."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members[:-1]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(members[-1][0])
        info.size = len(members[-1][1]) if size is None else size
        for field, value in fields.items():
            setattr(info, field, value)
        header = info.tobuf(tarfile.GNU_FORMAT)
    whole = path.read_bytes()
    at = sum(512 + -(-len(data) // 512) * 512 for _, data in members[:-1])
    payload = members[-1][1]
    path.write_bytes(whole[:at] + header + payload + bytes(-len(payload) % 512) + bytes(2048))
    return path


@pytest.mark.parametrize(
    ("members", "fields", "message"),
    [
        ([("a.txt", b"x")], {"size": 1 << 35}, "declares 34359738368 bytes"),
        ([("a.other", b"x")], {"size": 1 << 35}, "declares 34359738368 bytes"),
        ([("a.txt", b"x")], {"size": -(1 << 33)}, "damaged header"),
        ([("a.txt", b"x")], {"size": 1 << 35, "type": tarfile.XHDTYPE}, "extended header of 34359738368 bytes"),
        (
            [("a.txt", b"x")],
            {"size": 1 << 35, "type": tarfile.GNUTYPE_LONGNAME},
            "extended header of 34359738368 bytes",
        ),
        ([("a.txt", b"x")], {"size": 1 << 35, "type": tarfile.DIRTYPE}, "ends in the middle"),
        ([("a.txt", b"x"), ("a.pkl", b"x")], {}, "'a.pkl' is of an unsafe format"),
        ([("a.txt", b"x"), ("a.TXT.PT", b"x")], {}, "unsafe format"),
        ([("a.__key__", b"x")], {}, "unsafe format"),
        ([("../a.txt", b"x")], {}, "unsafe name"),
        ([("/a.txt", b"x")], {}, "unsafe name"),
        ([("a\n.txt", b"x")], {}, "unsafe name"),
        ([("a.txt", b"x")], {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link or device"),
        ([("a.txt", b"x")], {"type": tarfile.GNUTYPE_SPARSE}, "link or device"),
        ([("a.txt", b"x"), ("a.txt", b"y")], {}, "two members"),
        ([("a.png", b"x"), ("b.png", b"y"), ("a.txt", b"y")], {}, "side by side"),
    ],
)
def test_what_cannot_be_trusted_is_refused_at_once(
    members: list[tuple[str, bytes]], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tar_of(tmp_path / "bomb.tar", *members, **fields)
    began = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        list(read_shard(str(path), path.name, EXTENSIONS))
    assert time.monotonic() - began < 1 and "bomb.tar" in str(caught.value)


@pytest.mark.parametrize(("size", "message"), [(str(1 << 35), "declares 34359738368 bytes"), ("-5", "impossible size")])
def test_an_extended_header_cannot_replace_a_size_by_any(size: str, message: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bomb.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.pax_headers = 1, {"size": size}
        tar.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DataError, match=message):
        list(read_shard(str(tmp_path / "bomb.tar"), "bomb.tar", EXTENSIONS))


class Endless(io.RawIOBase):
    """A server that goes on for ever."""

    def __init__(self, head: bytes, then: bytes) -> None:
        self.head, self.then, self.given = head, then, 0

    def read(self, size: int = -1) -> bytes:
        data, self.head = self.head[:size], self.head[size:]
        data += (self.then * (size // len(self.then) + 1))[: size - len(data)]
        self.given += len(data)
        return data


def directory() -> bytes:
    info = tarfile.TarInfo("a")
    info.type = tarfile.DIRTYPE
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("then", [bytes(512), directory()])
def test_an_endless_stream_is_given_up(then: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Endless(b"", then)
    monkeypatch.setattr("mmrep.data.tar_stream.open_url", lambda url: endless)
    began = time.monotonic()
    with pytest.raises(DataError, match="goes on and on"):
        list(read_shard("http://endless/a.tar", "a.tar", EXTENSIONS))
    assert endless.given < 64 << 20 and time.monotonic() - began < 5


def test_what_a_header_declares_is_not_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    info = tarfile.TarInfo("a.flac")
    info.size = 400 << 20
    monkeypatch.setattr("mmrep.data.tar_stream.open_url", lambda url: io.BytesIO(info.tobuf(tarfile.GNU_FORMAT)))
    tracemalloc.start()
    with pytest.raises(DataError, match="middle of a member"):
        list(read_shard("http://cut/a.tar", "a.tar", frozenset({"flac"})))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_reads_what_tarfile_and_tar_writers_write(tmp_path: Path) -> None:
    members = {f"{'folder/' * i}{i:03d}.txt": bytes([i]) * (i * 137) for i in range(12)}
    members |= {"x" * 180 + ".txt": b"long", "élan/ключ.txt": "ü".encode(), "README": b"no sample"}
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found = {s["__key__"] + ".txt": s["txt"] for s in read_shard(str(tmp_path / "a.tar"), "a.tar", EXTENSIONS)}
        assert found == {name: data for name, data in members.items() if name != "README"}


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_sample_end_the_run(workers: int, tmp_path: Path) -> None:
    for folder in ("empty", "other", "broken"):
        (tmp_path / folder).mkdir()
    write_pairs(tmp_path / "empty", (0, 0, 0))
    write_shard(tmp_path / "other" / "a.tar", [{"__key__": "a", "json": {}, "cls": "1"}])
    write_shard(tmp_path / "broken" / "a.tar", [{"__key__": "a", "png": b"none", "txt": "a"}])
    began = time.monotonic()
    for folder, message in (("empty", "no sample of 3 shards"), ("other", "no sample of 1 "), ("broken", "in a row")):
        with pytest.raises(DataError, match=message):
            list(loader(tmp_path / folder, workers))
    assert time.monotonic() - began < 10


def test_a_corrupt_sample_is_skipped_and_reported_and_a_missing_modality_is_missing(tmp_path: Path) -> None:
    samples = pairs(0, 20)
    samples[3]["png"] = samples[3]["png"][:40]
    samples[5]["txt"] = "x" * 300_000
    del samples[7]["txt"]
    write_shard(tmp_path / "a.tar", samples)
    batches = list(loader(tmp_path, batches_per_epoch=10))
    faults = {fault for batch in batches for fault in batch.faults}
    found = {(fault.shard, fault.key, fault.modality, fault.reason) for fault in faults}
    assert found == {("a.tar", "k0003", "image", "undecodable"), ("a.tar", "k0005", "text", "too large")}
    keys = {key for batch in batches for key in batch.keys}
    assert keys == {sample["__key__"] for sample in samples} - {"k0003", "k0005"}
    for batch in batches:
        assert batch.present["text"].tolist() == [key != "k0007" for key in batch.keys]


def divides_by_zero(raw: object) -> torch.Tensor:
    raise ZeroDivisionError


def says_no_place(raw: object) -> torch.Tensor:
    raise DataError("of another kind", fix="set it in the config")


@pytest.mark.parametrize(
    ("fail", "kind", "message"),
    [
        (says_no_place, DataError, r"of another kind \[a\.tar:k0000\]; set it"),
        (divides_by_zero, ZeroDivisionError, r"while preparing 'text' of a\.tar:k0000"),
    ],
)
def test_what_is_no_fault_of_the_contents_names_the_sample(
    fail: Callable[[object], torch.Tensor], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    write_shard(tmp_path / "a.tar", pairs(0, 1))
    made = loader(tmp_path)
    assert isinstance(made.dataset, StreamDataset)
    made.dataset.transforms["text"] = fail
    with pytest.raises(kind) as caught:
        list(made)
    assert re.search(message, "".join(traceback.format_exception(caught.value)))


def test_a_run_stops_at_too_many_faults_and_lists_them(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path / "shards", {"train": (8,), "val": (12,), "test": (8,)})
    samples = [{"__key__": f"k{n}", "png": png(COLOURS[n % 6]), "txt": "a", "flac": b"no sound"} for n in range(3)]
    write_shard(shards / "train-bad.tar", samples)
    data = {
        "stream": Stream(TINY, batches_per_epoch=4, shuffle_buffer=16),
        "path": str(shards / "train-*.tar"),
        "quarantine": str(tmp_path / "q.csv"),
    }
    with pytest.raises(DataError, match="samples cannot be used, more than the 1 of"):
        fit(shards, tmp_path / "no", data=data)
    assert "train-bad.tar,,k" in (tmp_path / "q.csv").read_text()
    fit(shards, tmp_path / "yes", data={**data, "max_bad_fraction": 0.1}, max_epochs=2)
    assert (tmp_path / "q.csv").read_text().count("train-bad.tar") == 3


def test_settings_that_cannot_work_are_refused(uneven: Path) -> None:
    with pytest.raises(ConfigError, match="batches_per_epoch=0"):
        loader(uneven, batches_per_epoch=0)
    with pytest.raises(DataError, match=r"no decoder for '\.pkl'"):
        loader(uneven, modalities={"image": ["pkl"]})
    with pytest.raises(ConfigError, match="has no extensions"):
        loader(uneven, modalities={"image": []})
    with pytest.raises(DataError, match=r"'\.txt' is no image format"):
        loader(uneven, modalities={"image": ["png", "txt"]})
    with pytest.raises(ConfigError, match=r"no modality 'text'.*did you mean 'texts'"):
        loader(uneven, modalities={"image": ["png"], "texts": ["txt"]})
    with pytest.raises(ConfigError, match="modality 'text' is audio, its encoder NgramTextEncoder takes text"):
        loader(uneven, modalities={"image": ["png"], "text": ["flac"]})
    with pytest.raises(ConfigError, match="cannot be shared by 3 ranks"):
        loader(uneven, world=3)
    with pytest.raises(DataError, match="'pipe:' is no place"):
        loader("pipe:touch x.tar")
    with pytest.raises(DataError, match="no shards"):
        loader(uneven / "none-*.tar")
    with pytest.raises(ConfigError, match="not a blend"):
        ShardDataModule([Source(str(uneven))], stream=Stream(MODALITIES, 1))


def test_sounds_come_too(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path, {"train": (20,), "val": (1,), "test": (1,)})
    stream = Stream({"audio": ["wav", "flac"]}, batches_per_epoch=2)
    dataset = StreamDataset(
        str(shards / "train-*.tar"), stream, {"audio": MelAudioEncoder(8, seconds=0.2, width=8)}, global_batch_size=4
    )
    assert all(batch.present["audio"].all() for batch in StreamLoader(dataset))
