"""Files made to hurt: each is refused within a second and a hundred megabytes, and none runs anything."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmrep.data.build import build_index
from mmrep.data.decode import decode
from mmrep.data.index import Index, Modality
from mmrep.data.reader import Samples
from mmrep.data.writer import write_shard
from mmrep.errors import DataError, MmrepError, SampleError

SECONDS, MEGABYTES = 1.0, 100
TEXT = {"text": Modality(("txt",), "text")}


def one_member(
    folder: Path, name: str, data: bytes = b"x", size: int | None = None, pax: dict[str, str] | None = None
) -> Path:
    """A tar of one member, whose header may declare another size."""
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    info.pax_headers = pax or {}
    path = folder / "train-0.tar"
    path.write_bytes(
        info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512 + 1024)
    )
    return path


def index(folder: Path) -> Any:
    return build_index(folder, TEXT)


def declared_size(folder: Path) -> Any:
    one_member(folder, "a.txt", size=1 << 35)
    return index(folder)


def declared_pax_size(folder: Path) -> Any:
    one_member(folder, "a.txt", size=1, pax={"size": str(1 << 60)})
    return index(folder)


def giant_pax_header(folder: Path) -> Any:
    header = tarfile.TarInfo("a")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    path = folder / "train-0.tar"
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2 << 30)  # sparse: a file that really is so long
    return index(folder)


def npy_header(folder: Path) -> Any:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": (1 << 33,), "fortran_order": False, "descr": "<f4"})
    return decode("array", "npy", buffer.getvalue(), folder)


def npy_of_objects(folder: Path) -> Any:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    return decode("array", "npy", buffer.getvalue(), folder)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pixels(folder: Path) -> Any:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000), 9)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return decode("image", "png", png, folder)


def packed_zeros(megabytes: int) -> bytes:
    """A zlib stream of zeros. One megabyte is compressed and repeated: what is measured is to be the reader's work."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    once = deflate.compress(bytes(1_000_000)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + once * megabytes + b"\x03\x00" + struct.pack(">I", megabytes * 1_000_000 % 65521 << 16 | 1)


def png_text_chunk(folder: Path) -> Any:
    """A compressed text chunk that unpacks to 300 MB."""
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    text = b"Comment\0\0" + packed_zeros(300)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"zTXt", text)
    return decode("image", "png", png + chunk(b"IDAT", b"") + chunk(b"IEND", b""), folder)


def eps_named_jpg(folder: Path) -> Any:
    eps = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch "
        + str(folder / "ran").encode()
        + b") (w) file\n"
    )
    return decode("image", "jpg", eps, folder)


class Runs:
    """What unpickles to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickle_member(folder: Path) -> Any:
    one_member(folder, "a.pkl", pickle.dumps(Runs(folder / "ran")))
    return index(folder)


def torch_member(folder: Path) -> Any:
    one_member(folder, "a.pth", pickle.dumps(Runs(folder / "ran")))
    return index(folder)


def gz_member(folder: Path) -> Any:
    import gzip

    one_member(folder, "a.txt.gz", gzip.compress(bytes(50_000_000)))
    return index(folder)


def gz_shard(folder: Path) -> Any:
    import gzip

    (folder / "train-0.tar").write_bytes(gzip.compress(bytes(50_000_000)))
    return index(folder)


def pipe(folder: Path) -> Any:
    return Index.load(f"pipe:touch {folder / 'ran'}")


def pipe_shards(folder: Path) -> Any:
    return build_index(f"pipe:touch {folder / 'ran'}", TEXT)


def outside(folder: Path) -> Any:
    one_member(folder, "../ran/a.txt")
    return index(folder)


def long_text(folder: Path) -> Any:
    write_shard(folder / "train-0.tar", [{"__key__": "a", "txt": "x" * 20_000_000}])
    index(folder).save()
    return Samples(Index.load(folder), "train").read(0, "txt")


def deep_json(folder: Path) -> Any:
    return decode("json", "json", b"[" * 200_000, folder)


def wav_header(folder: Path) -> Any:
    data = b"RIFF\xff\xff\xff\x7fWAVEfmt \x10\0\0\0\1\0\1\0\x80>\0\0\0}\0\0\2\0\x10\0data\xf0\xff\xff\x7f" + bytes(100)
    return decode("audio", "wav", data, folder)


def lying_table(folder: Path) -> Any:
    """An index whose arrays claim a member of four gigabytes."""
    write_shard(folder / "train-0.tar", [{"__key__": "a", "txt": "x"}])
    index(folder).save()
    (path,) = folder.glob("index-*/members.npy")
    members = np.load(path)
    members["size"] = (1 << 32) - 1
    np.save(path, members)
    return Samples(Index.load(folder), "train").read(0, "txt")


def endless_index(folder: Path) -> Any:
    (folder / "index.json").write_text('{"format": ' + "[" * 100_000)
    return Index.load(folder)


BOMBS: list[Callable[[Path], Any]] = [
    *(declared_size, declared_pax_size, giant_pax_header, npy_header, npy_of_objects, pixels, png_text_chunk),
    *(
        eps_named_jpg,
        pickle_member,
        torch_member,
        gz_member,
        gz_shard,
        pipe,
        pipe_shards,
        outside,
        long_text,
        deep_json,
    ),
    *(lying_table, endless_index),
]


def measured(bomb: Callable[[Path], Any], folder: Path, answer: Any) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        value = bomb(folder)
        outcome = ("accepted", repr(value)[:80])
    except MmrepError as error:
        outcome = ("refused", str(error))
    except BaseException as error:
        outcome = (type(error).__name__, str(error))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.send((*outcome, time.process_time() - start, (after - before) / 1024))


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_bombs_are_refused_at_once(bomb: Callable[[Path], Any], tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=measured, args=(bomb, tmp_path, theirs))
    process.start()
    assert ours.poll(20), "it hangs"
    outcome, message, seconds, megabytes = ours.recv()
    process.join()
    assert outcome == "refused", (outcome, message)
    assert "\n" not in message and seconds < SECONDS and megabytes < MEGABYTES, (message, seconds, megabytes)
    assert not (tmp_path / "ran").exists()


def test_the_text_chunk_is_a_whole_stream() -> None:
    assert zlib.decompress(packed_zeros(3)) == bytes(3_000_000)


def test_a_wave_that_claims_more_than_it_has_is_what_it_has(tmp_path: Path) -> None:
    """soundfile reads a truncated wave to its end: fifty samples, not a billion."""
    samples, rate = wav_header(tmp_path)
    assert len(samples) == 50 and rate == 16000


def test_json_that_is_no_index_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{}", "null", '{"format": {}}', json.dumps({"format": "mmrep-index-2", "shards": 3})):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError):
            Index.load(tmp_path)


def test_a_member_above_its_bound_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "txt": "x" * 300_000}, {"__key__": "b", "txt": "y"}])
    index(tmp_path).save()
    samples = Samples(Index.load(tmp_path), "train")
    read: list[int] = []
    monkeypatch.setattr(samples.files, "read", lambda shard, offset, size: read.append(size))
    (found,) = samples.read_many(np.array([0]), [[0]])[0]
    assert isinstance(found, SampleError) and found.reason == "too large" and not read
