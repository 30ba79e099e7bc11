"""Symile-M3's Parquet: rows by number over files and row groups, contents, classes, damage."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.symile_m3 import ParquetRows, main
from data_prep.table.parquet_files import ROWS_AT_ONCE, batches
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.errors import DataError
from tests.data_prep.releases import jpeg, put, write_symile_m3
from tests.tiny import file_bytes, flac


def test_rows_by_number_over_files_and_row_groups(tmp_path: Path) -> None:
    root = write_symile_m3(tmp_path / "symile-m3-2-xs")
    rows = ParquetRows(sorted(root.glob("train-*.parquet")))
    assert rows.starts == [0, 3, 5, 8, 10] and len(rows) == 10
    assert [rows[number]["row"] for number in (9, 0, 4, 5)] == [9, 0, 4, 5]
    assert rows[7]["text"] == "goldfish_λέξη 7" and [row["cls_id"] for row in rows[2:5]] == [2, 0, 1]


def test_a_row_becomes_a_triple_and_classes_are_groups(tmp_path: Path) -> None:
    root, out = write_symile_m3(tmp_path / "symile-m3-2-xs"), tmp_path / "out"
    assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    index = Index.load(out)
    assert {name: len(Samples(index, name)) for name in index.splits} == {"train": 10, "val": 6, "test": 6}
    assert index.group_key == "cls_id" and index.labels["cls"].classes == ["tench", "goldfish", "dome"]
    samples = Samples(index, "train")
    assert samples.read(7, "jpg") == jpeg(7) and samples.read(7, "txt").decode() == "goldfish_λέξη 7"
    assert samples.read(7, "flac") == flac(307.0)  # by what the bytes are, not by the name ".mp3" beside them
    facts = {"cls": "goldfish", "cls_id": 1, "lang": "el", "target_text": "goldfish", "row": 7}
    assert json.loads(samples.read(7, "json")) == facts


def test_broken_cells_are_listed_and_null_is_a_missing_modality(tmp_path: Path) -> None:
    root, out = write_symile_m3(tmp_path / "symile-m3-2-xs"), tmp_path / "out"
    file = root / "val-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[1]["audio"] = None
    rows[2]["image"] = {"bytes": jpeg(2)[:80], "path": "x.JPEG"}
    rows[3]["image"] = {"bytes": None, "path": "x.JPEG"}
    rows[4]["audio"] = {"bytes": b"#!/bin/sh", "path": "x.mp3"}
    pq.write_table(table.from_pylist(rows, table.schema), file)
    assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    rejects = list(csv.DictReader((out / "rejects.csv").open()))
    assert [row["entry"] for row in rejects] == ["2", "3", "4"]
    assert "not in the table" in rejects[1]["reason"] and "unknown format" in rejects[2]["reason"]
    samples = Samples(Index.load(out), "val")
    assert len(samples) == 3 and not samples.has(1, "flac") and samples.has(1, "jpg")


def test_a_damaged_row_group_is_listed_row_by_row(tmp_path: Path) -> None:
    root, out = write_symile_m3(tmp_path / "symile-m3-2-xs"), tmp_path / "out"
    file = root / "test-00000-of-00001.parquet"
    offset = pq.ParquetFile(file).metadata.row_group(1).column(1).dictionary_page_offset or 0
    column = pq.ParquetFile(file).metadata.row_group(1).column(1)
    start = min(offset or column.data_page_offset, column.data_page_offset)
    data = bytearray(file.read_bytes())
    data[start : start + 24] = bytes(24)
    file.write_bytes(bytes(data))
    assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    rejects = list(csv.DictReader((out / "rejects.csv").open()))
    assert [row["entry"] for row in rejects] == ["3", "4", "5"] and "row group 1 cannot be read" in rejects[0]["reason"]
    assert len(Samples(Index.load(out), "test")) == 3


def test_processes_and_a_limit(tmp_path: Path) -> None:
    root = write_symile_m3(tmp_path / "symile-m3-2-xs")
    for workers in ("1", "2"):
        words = ["--root", str(root), "--out", str(tmp_path / workers), "--workers", workers, "--shard-entries", "4"]
        assert main([*words, "--limit", "9"]) == 0
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "2")
    assert len(Samples(Index.load(tmp_path / "1"), "train")) == 9


def test_without_translations_there_are_no_class_names(tmp_path: Path) -> None:
    root = write_symile_m3(tmp_path / "symile-m3-2-xs")
    (tmp_path / "translations.json").unlink()
    assert main(["--root", str(root), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert set(Index.load(tmp_path / "out").labels) == {"lang"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("readme.md", b"x", "not the layout of Symile-M3: none of train-*.parquet"),
        ("train-00000-of-00001.parquet", b"PAR1 and no more", "the table cannot be read"),
    ],
)
def test_wrong_layout_is_one_line(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "root" / name, content)
    assert main(["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_table_of_something_else_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa

    (tmp_path / "root").mkdir()
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "root" / "train-0.parquet")
    assert main(["--root", str(tmp_path / "root"), "--out", str(tmp_path / "out")]) == 2
    assert "no column audio, cls, cls_id" in capsys.readouterr().err


def test_a_few_rows_are_held_however_large_the_row_group(tmp_path: Path) -> None:
    """70 rows of 1 MiB, all the same: a file of kilobytes. Only one batch of them is unpacked at a time."""
    import pyarrow as pa

    count, size = 70, 1 << 20
    same = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([bytes(size)], pa.binary()))
    cells = pa.StructArray.from_arrays([same.cast(pa.binary()), pa.array(["a"] * count)], ["bytes", "path"])
    texts = {name: ["x"] * count for name in ("lang", "text", "cls", "target_text")}
    table = pa.table({**texts, "audio": cells, "image": cells, "cls_id": range(count)})
    file = tmp_path / "train-0.parquet"
    pq.write_table(table, file, compression="zstd", row_group_size=count, dictionary_pagesize_limit=4 * size)
    assert file.stat().st_size < 100_000
    del same, cells, table
    rows, before = ParquetRows([file]), pa.total_allocated_bytes()
    for number in (0, 1, 20, 69, 3):
        assert rows[number]["cls_id"] == number and len(rows[number]["image"]["bytes"]) == size
        assert pa.total_allocated_bytes() - before < 2.5 * 2 * ROWS_AT_ONCE * size


def test_a_damaged_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_symile_m3(tmp_path / "symile-m3-2-xs")
    rows, opened = ParquetRows([root / "test-00000-of-00001.parquet"]), list[int]()

    def broken(file: Path, columns: object, groups: list[int]) -> Iterator[object]:
        opened.extend(groups)
        raise DataError("damaged", where=file)
        yield

    monkeypatch.setattr("data_prep.symile_m3.batches", broken)
    for number in (3, 4, 5):
        with pytest.raises(DataError, match=r"row group 1 cannot be read \(damaged\)"):
            rows[number]
    assert opened == [1]


def test_columns_of_another_type_are_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa

    root = write_symile_m3(tmp_path / "symile-m3-2-xs")
    file = root / "val-00000-of-00001.parquet"
    table = pq.read_table(file)
    for name, values in (("image", ["a path"] * 6), ("cls_id", [[1]] * 6)):
        column = table.schema.get_field_index(name)
        pq.write_table(table.set_column(column, name, pa.array(values)), file)
        out = tmp_path / name
        assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
        assert len(list(csv.DictReader((out / "rejects.csv").open()))) == 6


def test_webp_is_a_picture(tmp_path: Path) -> None:
    """WebP and WAV both begin with RIFF."""
    root, out = write_symile_m3(tmp_path / "symile-m3-2-xs"), tmp_path / "out"
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, "WEBP")
    file = root / "val-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[2]["image"] = {"bytes": buffer.getvalue(), "path": "x.JPEG"}
    pq.write_table(table.from_pylist(rows, table.schema), file)
    assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    assert Samples(Index.load(out), "val").read(2, "webp") == buffer.getvalue()


def test_only_the_row_group_that_is_read_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr("data_prep.table.parquet_files.MAX_CELL_BYTES", 1000)
    file, texts = tmp_path / "t.parquet", ["x" * 10_000 + str(n) for n in range(8)]
    pq.write_table(pa.table({"a": [*"01234567", *texts]}), file, row_group_size=8)
    assert sum(batch.num_rows for batch in batches(file, ["a"], [0])) == 8
    for groups in ([1], None):
        with pytest.raises(DataError, match="bytes in 8 rows of column 'a'"):
            next(batches(file, ["a"], groups))
