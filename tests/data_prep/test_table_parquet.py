"""Tables of Parquet and JSONL, of many files, in little memory, and of bytes that mean harm."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.table import main
from data_prep.table.spool import write_spool
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.writer import npy_bytes
from tests.data_prep.test_table import read_back, rejects
from tests.killed import ended, forked
from tests.tiny import flac, png

PICTURES = [png((10 * n, 5, 5), noise=n) for n in range(6)]
SOUNDS = [flac(200.0 + n) for n in range(6)]


def run(table: Path | list[Path], out: Path, *options: str) -> int:
    tables = table if isinstance(table, list) else [table]
    return main(["--table", *map(str, tables), "--out", str(out), "--workers", "1", *options])


def hugging_face() -> dict[str, Any]:
    """Six rows as the `datasets` package writes image, audio and sequence features."""
    return {
        "image": [{"bytes": PICTURES[n], "path": "wrong.jpg" if n else None} for n in range(6)],
        "audio": [None if n == 2 else {"bytes": SOUNDS[n], "path": f"{n}.flac"} for n in range(6)],
        "caption": [f"Bild {n}, ü" for n in range(6)],
        "signal": [[[n, 1.5], [2.0, 3.0]] for n in range(6)],
        "label": [n % 2 for n in range(6)],
        "age": [None if n == 4 else n + 0.25 for n in range(6)],
    }


def write(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    pq.write_table(pa.table(columns), path, **settings)
    return path


OPTIONS = [
    "--image",
    "image",
    "--audio",
    "audio",
    "--text",
    "caption",
    "--array",
    "signal",
    "--values",
    "labs=age,label",
]


def test_bytes_lists_and_numbers_come_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(write(tmp_path / "t.parquet", hugging_face()), out, *OPTIONS, "--label-key", "label") == 0
    samples = read_back(out)
    assert sorted(samples) == [0, 1, 2, 3, 4, 5]
    for row, members in samples.items():
        assert members["png"] == PICTURES[row] and members.get("flac") == (None if row == 2 else SOUNDS[row])
        assert members["txt"].decode() == f"Bild {row}, ü"
        np.testing.assert_array_equal(
            decode("array", "npy", members["signal.npy" if "signal.npy" in members else "array.npy"], ""),
            np.array([[row, 1.5], [2.0, 3.0]]),
        )
        labs = decode("array", "npy", members["labs.npy"], "")
        np.testing.assert_array_equal(labs, np.array([np.nan if row == 4 else row + 0.25, row % 2], np.float32))
    assert Index.load(out).labels["label"].classes == ["0", "1"]


def test_every_type_of_column_that_is_taken(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    columns = {
        "plain": pa.array([PICTURES[0], PICTURES[1]], pa.large_binary()),
        "coded": pa.array([PICTURES[0], PICTURES[0]]).dictionary_encode(),
        "npy": [npy_bytes(array), npy_bytes(array + 1)],
        "fixed": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float16(), 2)),
        "large": pa.array([[1], [2, 3]], pa.large_list(pa.int8())),
        "tensor": tensor,
        "utf8": pa.array([b"caf\xc3\xa9", b"au lait"], pa.binary()),
        "when": pa.array([0, 1], pa.timestamp("s")),
        "yes": [True, False],
    }
    kinds = {"plain": "image", "coded": "image", "utf8": "text", "when": "text"} | dict.fromkeys(
        ("npy", "fixed", "large", "tensor"), "array"
    )
    options = [word for name, kind in kinds.items() for word in ("--modality", f"{name}={kind}:{name}")]
    options += ["--values", "yes=yes", "--val-fraction", "0", "--test-fraction", "0"]
    assert run(write(tmp_path / "t.parquet", columns), tmp_path / "out", *options) == 0
    members = read_back(tmp_path / "out")[1]
    arrays = {
        name: decode("array", "npy", members[f"{name}.npy"], "") for name in ("npy", "fixed", "large", "tensor", "yes")
    }
    assert [arrays["fixed"].tolist(), arrays["large"].tolist(), arrays["yes"].tolist()] == [[3, 4], [2, 3], [0]]
    assert arrays["fixed"].dtype == np.float16 and arrays["large"].dtype == np.int8
    np.testing.assert_array_equal(arrays["npy"], array + 1)
    np.testing.assert_array_equal(arrays["tensor"], np.arange(12, 24).reshape(3, 4))
    assert members["plain.png"] == PICTURES[1] and members["coded.png"] == PICTURES[0]
    assert members["utf8.txt"] == b"au lait" and members["when.txt"] == b"1970-01-01 00:00:01"


def test_a_path_in_place_of_bytes_is_read_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURES[3])
    cells = [
        {"bytes": None, "path": "a.png"},
        {"bytes": None, "path": "../a.png"},
        {"bytes": b"nothing", "path": "x.png"},
    ]
    table = write(tmp_path / "t.parquet", {"image": cells})
    assert run(table, tmp_path / "out", "--image", "image", "--max-rejects", "0.9") == 0
    assert {row: members["png"] for row, members in read_back(tmp_path / "out").items()} == {0: PICTURES[3]}
    assert [(r["row"], r["value"], r["reason"].split(" (")[0]) for r in rejects(tmp_path / "out")] == [
        ("1", "../a.png", "outside the root folder"),
        ("2", "<7 bytes>", "image .png cannot be decoded"),
    ]


def test_ragged_lists_and_empty_places_are_rejects(tmp_path: Path) -> None:
    columns = {"x": [[[1.0], [2.0, 3.0]], [[1.0, None]], [None], [[5.0, 6.0]]]}
    assert run(write(tmp_path / "t.parquet", columns), tmp_path / "out", "--array", "x", "--max-rejects", "0.8") == 0
    assert list(read_back(tmp_path / "out")) == [3]
    assert [reject["reason"] for reject in rejects(tmp_path / "out")] == [
        "a list whose parts differ in length",
        "a list with an empty place",
        "a list whose parts differ in length",
    ]


def test_jsonl_and_many_files_say_where_a_row_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    write(folder / "a.parquet", {"caption": ["a0", "a1"], "x": [[1.0], [2.0]]})
    lines = [
        {"caption": "b1", "x": [3]},
        {"caption": "b2"},
        7,
        {"caption": ["no"], "x": [4]},
        {"caption": "b5", "x": "nan"},
    ]
    (folder / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n\n")
    (folder / "notes.txt").write_text("no table")
    options = ["--text", "caption", "--array", "x", "--max-rejects", "0.7"]
    assert run(folder, tmp_path / "out", *options) == 0
    samples = read_back(tmp_path / "out")
    found = {json.loads(m["json"])["file"] + str(json.loads(m["json"])["row"]): m["txt"] for m in samples.values()}
    assert found == {"a.parquet0": b"a0", "a.parquet1": b"a1", "b.jsonl1": b"b1", "b.jsonl2": b"b2"}
    assert len(samples) == 4, "keys are unique over the files"
    assert [(r["file"], r["row"], r["reason"].split(" (")[0]) for r in rejects(tmp_path / "out")] == [
        ("b.jsonl", "3", "no JSON object"),
        ("b.jsonl", "4", "a list of <U2 and 8 bytes is no array of numbers"),
        ("b.jsonl", "5", "no such file"),
        ("b.jsonl", "6", "no JSON"),
    ]
    assert run([folder / "*.parquet", folder / "b.jsonl"], tmp_path / "again", *options) == 0
    assert read_back(tmp_path / "again") == samples
    capsys.readouterr()
    assert [table["name"] for table in Index.load(tmp_path / "out").provenance["tables"]] == ["a.parquet", "b.jsonl"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [["a"], ["b"]]}, ["--text", "x"], "column 'x' holds list<"),
        ({"x": [{"a": 1}]}, ["--image", "x"], "column 'x' holds struct<a: int64>, which is no image"),
        ({"x": [1, 2]}, ["--image", "x"], "column 'x' holds int64, which is no image"),
        ({"x": [[1.0]]}, ["--values", "v=x"], "which is no values"),
        ({"x": [b"1"], "y": ["t"]}, ["--text", "y", "--split", "x"], "column 'x' holds binary, which is no names"),
        ({"caption": ["a"]}, ["--text", "captoin"], "no column 'captoin'"),
        ({"x": pa.array([], pa.string())}, ["--text", "x"], "the table has no rows"),
    ],
)
def test_wrong_columns_answer_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], options: list[str], message: str
) -> None:
    table = write(tmp_path / "t.parquet", columns)
    assert run(table, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [table]


def test_wrong_places_answer_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no parquet PAR1")
    for place, message in (
        ("nowhere", "no such table"),
        ("empty", "no such table"),
        ("*.csv", "no such table"),
        ("t.parquet", "the table cannot be read"),
    ):
        assert run(tmp_path / place, tmp_path / "out", "--text", "x") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    (tmp_path / "empty" / "t.parquet").write_bytes(b"")
    assert run([tmp_path / "t.parquet", tmp_path / "empty"], tmp_path / "out", "--text", "x") == 2
    assert "two files of the table are named 't.parquet'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_damaged_parquet_answers_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = write(tmp_path / "t.parquet", hugging_face(), write_page_checksum=True).read_bytes()
    rng = random.Random(3)
    for number in range(60):
        broken = bytearray(whole)
        if number % 3:
            for _ in range(number % 5 + 1):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        else:
            del broken[rng.randrange(len(broken)) :]
        (tmp_path / "t.parquet").write_bytes(broken)
        process = forked(  # what would crash the interpreter fails this test, not the session
            lambda: run(tmp_path / "t.parquet", tmp_path / "out", *OPTIONS, "--overwrite", "--max-rejects", "0.9"),
            log := tmp_path / f"log{number}",
        )
        assert ended(process) in (0, 2), log.read_text()
        assert "Traceback" not in log.read_text()
    capsys.readouterr()


def test_cells_that_unpack_to_too_much_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write(tmp_path / "t.parquet", {"x": [bytes(2_000_000)]}, compression="zstd", use_dictionary=False)
    assert table.stat().st_size < 2_000
    for module in ("parquet_files", "cell"):
        monkeypatch.setattr(f"data_prep.table.{module}.MAX_CELL_BYTES", 1_000_000)
    assert run(table, tmp_path / "out", "--image", "x") == 2
    error = capsys.readouterr().err
    assert "the table cannot be read (2000" in error and "bytes in 1 rows of column 'x')" in error
    columns = {"x": [png((1, 2, 3)), bytes(1_500_000), png((3, 2, 1))]}  # on average they are small enough
    assert run(write(table, columns, compression="zstd"), tmp_path / "out", "--image", "x", "--max-rejects", "0.5") == 0
    assert [(r["row"], r["reason"]) for r in rejects(tmp_path / "out")] == [("1", "more than 1000000 bytes")]


class Harm:
    """Unpickling this touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_pickles_in_cells_and_in_types_run_nothing(tmp_path: Path) -> None:
    harm = pickle.dumps(Harm(tmp_path / "harmed"))
    file = io.BytesIO()
    np.save(file, np.array([Harm(tmp_path / "harmed")]), allow_pickle=True)
    storage = pa.array([[1.0], [2.0], [3.0]])
    field = pa.field(
        "x",
        storage.type,
        metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": harm},
    )
    objects = pa.array([harm, file.getvalue(), npy_bytes(np.zeros(1))])
    schema = pa.schema(
        [field, pa.field("y", objects.type)], metadata={"pandas": b'{"columns": [{"numpy_type": "object"}]}'}
    )
    pq.write_table(pa.table([storage, objects], schema=schema), tmp_path / "t.parquet")
    options = ["--array", "x", "--modality", "y=array:y", "--max-rejects", "0.9"]
    assert run(tmp_path / "t.parquet", tmp_path / "out", *options) == 0
    assert list(read_back(tmp_path / "out")) == [2] and not (tmp_path / "harmed").exists()


def growth(work: Callable[[], object], folder: Path) -> int:
    """By how many bytes a forked process grows at most while it works, pages of files apart."""

    def measured() -> int:
        go.wait()
        work()
        return 0

    go = multiprocessing.Event()
    process = forked(measured, folder / "log")
    first = peak = anonymous_bytes(process)
    go.set()
    while (now := anonymous_bytes(process)) is not None:
        peak = max(peak or 0, now)
        time.sleep(0.003)
    assert ended(process) == 0, (folder / "log").read_text()
    return (peak or 0) - (first or 0)


def anonymous_bytes(process: int) -> int | None:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
    return found[0] if found else None  # a process that has ended has none


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
@pytest.mark.parametrize("stored_schema", [True, False])
def test_a_dictionary_that_says_the_same_many_times_is_not_spread_out(tmp_path: Path, stored_schema: bool) -> None:
    """2,000 cells of 0.9 MB in a file of less than 1 MB."""
    value = npy_bytes(np.random.default_rng(0).normal(size=112_000))
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([value]))
    table = write(tmp_path / "t.parquet", {"x": cells}, store_schema=stored_schema)
    assert table.stat().st_size < 1_000_000
    assert growth(lambda: write_spool(table, ["x"], tmp_path / "spool"), tmp_path) < 160 * 2**20
    assert (tmp_path / "spool").stat().st_size < 2_000_000, "equal bytes are kept once"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured on Linux")
@pytest.mark.parametrize("settings", [{"row_group_size": 100}, {"row_group_size": 2000, "write_batch_size": 64}])
def test_a_large_file_takes_little_memory(tmp_path: Path, settings: dict[str, int]) -> None:
    """200 MB in 2,000 rows: in small row groups, or in one of many pages."""
    rng = np.random.default_rng(0)
    cells = pa.array((rng.bytes(100_000) for _ in range(2000)), pa.binary())
    pq.write_table(pa.table({"x": cells}), tmp_path / "t.parquet", use_dictionary=False, **settings)
    del cells
    assert (tmp_path / "t.parquet").stat().st_size > 200e6
    assert growth(lambda: write_spool(tmp_path / "t.parquet", ["x"], tmp_path / "spool"), tmp_path) < 80 * 2**20
