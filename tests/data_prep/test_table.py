"""`python -m data_prep.table`, end to end on small tables of real files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.table import main
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.scan import group_members
from mmrep.data.writer import npy_bytes
from tests.tiny import file_bytes

Table = list[dict[str, str]]


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_back(out: Path) -> dict[int, dict[str, bytes]]:
    """Row number -> its members (extension -> bytes), over all shards of the index."""
    samples: dict[int, dict[str, bytes]] = {}
    index = Index.load(out)
    for split, names in index.splits.items():
        for name in names:
            data = (out / name).read_bytes()
            for key, members in group_members(out / name):
                row = int(key.removeprefix(f"{split}-"))
                assert row not in samples
                samples[row] = {ext: data[m.offset : m.offset + m.size] for ext, m in members.items()}
    return samples


def records(out: Path) -> dict[int, dict[str, Any]]:
    return {row: json.loads(members["json"]) for row, members in read_back(out).items()}


def run(table: Path, out: Path, *options: str, workers: int = 1) -> int:
    return main(["--csv", str(table), "--out", str(out), "--workers", str(workers), *options])


def text_table(folder: Path, count: int = 60) -> Path:
    rows = [{"caption": f"text {n}", "patient": f"p{n // 4}", "kind": "cat" if n % 3 else "dog"} for n in range(count)]
    return write_table(folder / "t.csv", rows)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Six rows with a picture, a caption, a tone, an array and three numbers each."""
    rows: Table = []
    for n in range(6):
        Image.new("RGB", (40, 20 + n), (n, 2 * n, 3 * n)).save(tmp_path / f"{n}.png")
        soundfile.write(tmp_path / f"{n}.wav", np.full(80, n / 16, dtype=np.float32), 8000)
        np.save(tmp_path / f"{n}.npy", np.full((2, 3), n))
        files = {"photo": f"{n}.png", "tone": f"{n}.wav", "signal": f"{n}.npy"}
        rows.append(files | {"caption": f"Bild {n}, ü", "age": str(n), "bp": f"{n}.5", "hr": "" if n == 2 else "70"})
    return write_table(tmp_path / "table.csv", rows)


MEDIA = ["--image", "photo", "--text", "caption", "--audio", "tone", "--array", "signal"]


def edit(table: Path, row: int, **cells: str) -> None:
    """Change cells of a row, numbered as in a spreadsheet."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[row - 2] |= cells
    write_table(table, rows)


def rejects(out: Path) -> Table:
    with (out / "rejects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_kind_comes_back_as_it_was_in_the_row(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(media, out, *MEDIA, "--values", "labs=age,bp,hr") == 0
    samples = read_back(out)
    assert sorted(samples) == [2, 3, 4, 5, 6, 7]
    for row, members in samples.items():
        n = row - 2
        assert set(members) == {"json", "png", "txt", "wav", "array.npy", "labs.npy"}
        assert members["png"] == (tmp_path / f"{n}.png").read_bytes()
        assert members["wav"] == (tmp_path / f"{n}.wav").read_bytes()
        assert members["txt"].decode() == f"Bild {n}, ü"
        np.testing.assert_array_equal(decode("array", "npy", members["array.npy"], "test"), np.full((2, 3), n))
        labs = decode("array", "npy", members["labs.npy"], "test")
        assert labs.dtype == np.float32
        np.testing.assert_array_equal(labs, np.array([n, n + 0.5, np.nan if n == 2 else 70], dtype=np.float32))
    stored = {name: (m.kind, m.extensions) for name, m in Index.load(out).modalities.items()}
    assert stored["image"] == ("image", ("png",)) and stored["labs"] == ("array", ("labs.npy",))
    assert stored["array"] == ("array", ("array.npy",))
    assert rejects(out) == []


def test_an_empty_cell_is_an_absent_modality(media: Path, tmp_path: Path) -> None:
    edit(media, 3, tone="", caption="  ")
    edit(media, 4, age="", bp="", hr="")
    assert run(media, tmp_path / "out", *MEDIA, "--values", "labs=age,bp,hr") == 0
    samples = read_back(tmp_path / "out")
    assert set(samples[3]) == {"json", "png", "array.npy", "labs.npy"}
    assert set(samples[4]) == {"json", "png", "txt", "wav", "array.npy"}
    assert rejects(tmp_path / "out") == []


def test_rejects_are_listed_and_their_rows_dropped_whole(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    edit(media, 2, photo="gone.png", age="old")
    edit(media, 4, photo="broken.png")
    edit(media, 5, photo="", caption="", tone="", signal="", age="", bp="", hr="")
    edit(media, 6, bp="1e39")
    assert run(media, tmp_path / "out", *MEDIA, "--values", "labs=age,bp,hr", "--max-rejects", "0.7") == 0
    assert sorted(read_back(tmp_path / "out")) == [3, 7]
    assert [tuple(reject.values()) for reject in rejects(tmp_path / "out")] == [
        ("2", "age", "old", "not a number"),
        ("2", "photo", "gone.png", "no such file"),
        ("4", "photo", "broken.png", "image .png cannot be decoded (cannot identify image file)"),
        ("5", "", "", "no modality"),
        ("6", "bp", "1e39", "not a finite float32"),
    ]
    printed = capsys.readouterr().out
    assert "no such file" in printed and "listed in rejects.csv" in printed


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("http://host/a.png", "not a local file"),
        ("pipe:touch x", "not a local file"),
        ("../secret.png", "outside the root folder"),
        ("sub/../../secret.png", "outside the root folder"),
        (".", "no such file"),
        ("a.gif", "image .gif: no decoder for this format"),
        ("0.wav", "image .wav: no decoder for this format"),
        ("nul\0.png", "no such file"),
    ],
)
def test_unsafe_cells_are_rejected(media: Path, tmp_path: Path, cell: str, reason: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("0.wav", *(f"{n}.png" for n in range(6))):
        (tmp_path / name).rename(root / name)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    Image.new("RGB", (4, 4)).save(root / "a.gif")
    edit(media, 5, photo=cell)
    assert run(media, tmp_path / "out", "--image", "photo", "--root", str(root), "--max-rejects", "0.5") == 0
    assert sorted(read_back(tmp_path / "out")) == [2, 3, 4, 6, 7]
    found = rejects(tmp_path / "out")
    assert [(r["row"], r["column"], r["value"]) for r in found] == [("5", "photo", cell)]
    assert found[0]["reason"].startswith((reason, "cannot be read") if "\0" in cell else reason)


def test_an_absolute_path_of_the_user_is_taken(media: Path, tmp_path: Path) -> None:
    edit(media, 2, photo=str(tmp_path / "3.png"))
    (tmp_path / "elsewhere").mkdir()
    table = media.rename(tmp_path / "elsewhere" / "table.csv")
    options = ["--image", "photo", "--max-rejects", "0.9"]
    assert run(table, tmp_path / "out", *options) == 0
    assert {row: m["png"] for row, m in read_back(tmp_path / "out").items()} == {2: (tmp_path / "3.png").read_bytes()}


def test_two_modalities_of_one_kind_keep_their_names(media: Path, tmp_path: Path) -> None:
    edit(media, 2, tone="5.png")
    edit(media, 3, tone="")
    edit(media, 4, tone="")
    edit(media, 5, tone="")
    edit(media, 6, tone="")
    edit(media, 7, tone="")
    assert run(media, tmp_path / "out", "--image", "photo", "--modality", "Xray=image:tone") == 0
    samples = read_back(tmp_path / "out")
    assert samples[2]["image.png"] == (tmp_path / "0.png").read_bytes()
    assert samples[2]["xray.png"] == (tmp_path / "5.png").read_bytes()
    assert set(samples[3]) == {"json", "image.png"}
    modalities = Index.load(tmp_path / "out").modalities
    assert modalities["Xray"].extensions == ("xray.png",) and modalities["image"].extensions == ("image.png",)


def test_image_size_shrinks_the_shorter_side_and_only_if_larger(tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), "red").save(tmp_path / "big.png")
    Image.new("RGB", (60, 120), "red").save(tmp_path / "big.webp")
    Image.new("RGB", (200, 30), "red").save(tmp_path / "small.jpg")
    table = write_table(tmp_path / "t.tsv", [{"p": "big.png"}, {"p": "big.webp"}, {"p": "small.jpg"}])
    assert run(table, tmp_path / "out", "--image", "p", "--image-size", "30") == 0
    samples = read_back(tmp_path / "out")
    assert Image.open(io.BytesIO(samples[2]["png"])).size == (45, 30)
    shrunk = Image.open(io.BytesIO(samples[3]["jpg"]))
    assert (shrunk.size, shrunk.format) == ((30, 60), "JPEG")
    assert samples[4]["jpg"] == (tmp_path / "small.jpg").read_bytes()
    assert Index.load(tmp_path / "out").modalities["image"].extensions == ("jpg", "png")


def test_groups_stay_in_one_split_and_labels_are_indexed(tmp_path: Path) -> None:
    table = text_table(tmp_path, 400)
    options = ["--text", "caption", "--group-key", "patient", "--label-key", "kind"]
    assert run(table, tmp_path / "out", *options, "--val-fraction", "0.2", "--samples-per-shard", "50") == 0
    index, found = Index.load(tmp_path / "out"), records(tmp_path / "out")
    assert len(found) == 400 and index.group_key == "patient" and index.labels["kind"].classes == ["cat", "dog"]
    assert all(shard.samples <= 50 for shard in index.shards)
    splits: dict[str, set[str]] = {}
    for row, record in found.items():
        assert record["row"] == row and record["kind"] == ("cat" if (row - 2) % 3 else "dog")
        splits.setdefault(record["patient"], set()).add(record["split"])
    assert len(splits) == 100 and all(len(names) == 1 for names in splits.values())
    shares = {split: sum(record["split"] == split for record in found.values()) / 400 for split in index.splits}
    assert shares == pytest.approx({"train": 0.7, "val": 0.2, "test": 0.1}, abs=0.12)  # three deviations of 100 groups


def test_rows_are_mixed_and_the_seed_changes_order_and_split(tmp_path: Path) -> None:
    table = text_table(tmp_path)
    options = ["--text", "caption", "--val-fraction", "0.3"]
    assert run(table, tmp_path / "a", *options) == run(table, tmp_path / "b", *options, "--seed", "1") == 0
    first, second = records(tmp_path / "a"), records(tmp_path / "b")
    train = [row for row, record in first.items() if record["split"] == "train"]
    assert train != sorted(train)
    assert {row: r["split"] for row, r in first.items()} != {row: r["split"] for row, r in second.items()}


def test_equal_rows_without_a_group_share_a_split(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", [{"caption": f"text {n % 10}"} for n in range(60)])
    assert run(table, tmp_path / "out", "--text", "caption", "--val-fraction", "0.4") == 0
    found = records(tmp_path / "out")
    assert len({record["split"] for record in found.values()}) > 1
    for row, record in found.items():
        assert record["split"] == found[(row - 2) % 10 + 2]["split"]


def test_a_split_column_is_followed_and_leaks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["train", "dev", "train", "../up", ""]
    rows = [{"caption": f"t{n}", "s": name, "g": "same" if n < 2 else str(n)} for n, name in enumerate(names)]
    options = ["--text", "caption", "--split", "s", "--group-key", "g", "--max-rejects", "0.4"]
    assert run(write_table(tmp_path / "t.csv", rows), tmp_path / "out", *options) == 0
    assert {row: record["split"] for row, record in records(tmp_path / "out").items()} == {
        2: "train",
        3: "dev",
        4: "train",
    }
    assert [(r["row"], r["reason"]) for r in rejects(tmp_path / "out")] == [
        ("5", "not a split's name"),
        ("6", "no split"),
    ]
    assert "warning: 1 values of 'g' are in more than one split" in capsys.readouterr().out


def test_any_number_of_workers_writes_the_same_bytes(media: Path, tmp_path: Path) -> None:
    edit(media, 4, photo="gone.png")
    (tmp_path / "3.png").write_bytes(b"no picture")  # PIL's message holds an address
    for name, workers in (("a", 1), ("b", 2)):
        options = [*MEDIA, "--samples-per-shard", "1", "--image-size", "10", "--max-rejects", "0.4"]
        assert run(media, tmp_path / name, *options, workers=workers) == 0
    first, second = (file_bytes(tmp_path / name) for name in "ab")
    assert len(first) == 4 + 1 + 1 + 4 and first == second


def test_the_printed_table_counts_rows_and_presence(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(media, 3, tone="")
    edit(media, 5, photo="gone.png")
    options = [*MEDIA, "--val-fraction", "0", "--test-fraction", "0", "--max-rejects", "0.2"]
    assert run(media, tmp_path / "out", *options) == 0
    assert capsys.readouterr().out.splitlines() == [
        "split  rows  image  text  audio  array",
        "train     5      5     5      4      5",
        "",
        "rejects       cells",
        "no such file      1",
        "listed in rejects.csv",
        "",
        f"next: mmrep fit --config FILE.yaml --data.path {tmp_path / 'out'}",
    ]


def test_overwrite_removes_only_what_the_command_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = text_table(tmp_path), tmp_path / "out"
    assert run(table, out, "--text", "caption", "--samples-per-shard", "5") == 0
    before = {path.name for path in out.iterdir()}
    (out / "notes.md").write_text("mine")
    assert run(table, out, "--text", "caption") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == before | {"notes.md"}
    for options in ([], ["--seed", "3"]):  # the same shards again, and others
        assert run(table, out, "--text", "caption", *options, "--overwrite") == 0
    assert len(list(out.glob("index-*"))) == 1
    assert len(list(out.glob("*.tar"))) == 3 and (out / "notes.md").read_text() == "mine"
    assert len(read_back(out)) == 60 and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("limit", ["0.1", "1"])
def test_too_many_rejects_fail_and_leave_nothing(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    for row in range(2, 8 if limit == "1" else 3):
        edit(media, row, photo="gone.png")
    before = set(tmp_path.iterdir())
    assert run(media, tmp_path / "out", "--image", "photo", "--max-rejects", limit) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "no such file, as in row 2, column 'photo': 'gone.png'" in error
    assert set(tmp_path.iterdir()) == before


def test_a_failed_overwrite_keeps_what_was_there(media: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(media, out, "--image", "photo") == 0
    before = file_bytes(out)
    edit(media, 2, photo="gone.png")
    assert run(media, out, "--image", "photo", "--overwrite") == 2
    assert file_bytes(out) == before


def test_files_of_others_in_the_build_folder_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.tex").write_text("mine")
    assert run(text_table(tmp_path), tmp_path / "out", "--text", "caption") == 2
    assert (tmp_path / "out.part" / "thesis.tex").read_text() == "mine"


def test_a_ragged_row_is_a_reject_and_a_blank_line_is_no_row(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes('\ufeffa,b\r\none,1\r\n\r\ntwo\r\n"three\nlines",3\r\n'.encode())
    assert run(table, tmp_path / "out", "--text", "a", "--max-rejects", "0.4") == 0
    assert {row: m["txt"] for row, m in read_back(tmp_path / "out").items()} == {2: b"one", 5: b"three\nlines"}
    assert [(r["row"], r["reason"]) for r in rejects(tmp_path / "out")] == [("4", "1 cells, the header has 2")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "captoin"], "no column 'captoin' [{table}]; did you mean 'caption'?"),
        (["--text", "caption", "--group-key", "patent"], "no column 'patent' [{table}]; did you mean 'patient'?"),
        ([], "no modality is given; use --image"),
        (["--text", "caption", "--modality", "Text=text:kind"], "two modalities are named 'text'"),
        (["--modality", "x=imge:caption"], "did you mean 'image'?"),
        (["--modality", "../x=image:caption"], "write NAME=KIND:COLUMN"),
        (["--values", "labs"], "write NAME=COLUMN,COLUMN"),
        (["--text", "caption", "--split", "kind", "--val-fraction", "0.1"], "--split contradicts"),
        (["--text", "caption", "--val-fraction", "0.9"], "leave nothing to train on"),
        (["--text", "caption", "--val-fraction", "nan"], "leave nothing to train on"),
        (["--text", "caption", "--test-fraction", "nan"], "leave nothing to train on"),
        (["--text", "caption", "--samples-per-shard", "0"], "--samples-per-shard is 0"),
    ],
)
def test_wrong_requests_answer_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    table = text_table(tmp_path)
    assert run(table, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message.format(table=table) in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", None, "no such table"),
        ("t.xlsx", b"a\n1\n", "ends in .csv, .tsv, .jsonl, .parquet"),
        ("t.csv", b"", "the table has no rows"),
        ("t.csv", b"a\n", "the table has no rows"),
        ("t.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("t.csv", b'a\n"open\n', "cannot be read"),
        ("t.csv", b"a\n\xff\n", "cannot be read"),
    ],
)
def test_wrong_tables_answer_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, tmp_path / "out", "--text", "a") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_arrays_that_would_run_code_are_rejected(media: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "1.npy").write_bytes(npy_bytes(np.zeros(3))[:-1])
    assert run(media, tmp_path / "out", "--array", "signal", "--max-rejects", "0.5") == 0
    assert sorted(read_back(tmp_path / "out")) == [4, 5, 6, 7]
    assert [reject["row"] for reject in rejects(tmp_path / "out")] == ["2", "3"]


def test_a_caption_cut_inside_an_emoji_is_written_without_it(tmp_path: Path) -> None:
    """JSON's escapes can name half a character, which UTF-8 cannot hold."""
    table = tmp_path / "t.jsonl"
    table.write_text('{"caption": "a cat \\ud83d", "kind": "\\ud83d"}\n{"caption": "a dog", "kind": "dog"}\n')
    assert run(table, tmp_path / "out", "--text", "caption", "--label-key", "kind") == 0
    assert {row: members["txt"] for row, members in read_back(tmp_path / "out").items()} == {1: b"a cat ?", 2: b"a dog"}
    assert records(tmp_path / "out")[1]["kind"] == "?"
    assert Index.load(tmp_path / "out").labels["kind"].classes == ["?", "dog"]


def test_a_file_by_two_spellings_is_read_once(tmp_path: Path) -> None:
    table = text_table(tmp_path, 4)
    (tmp_path / "sub").mkdir()
    again = tmp_path / "sub" / ".." / "t.csv"
    assert main(["--table", str(table), str(again), "--out", str(tmp_path / "out"), "--text", "caption"]) == 0
    assert sorted(read_back(tmp_path / "out")) == [2, 3, 4, 5]


def test_two_names_are_refused_however_else_a_file_is_given_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = text_table(tmp_path, 4)
    (tmp_path / "sub").mkdir()
    other = text_table(tmp_path / "sub", 4)
    words = ["--table", str(table), str(tmp_path / "sub" / ".." / "t.csv"), str(other)]
    assert main([*words, "--out", str(tmp_path / "out"), "--text", "caption"]) == 2
    assert "two files of the table are named 't.csv'" in capsys.readouterr().err


def test_blank_lines_before_the_header_are_none(tmp_path: Path) -> None:
    """Among several files, the rows of such a one are not lost."""
    (tmp_path / "a.csv").write_text("\n\na,b\none,1\ntwo\n")
    (tmp_path / "b.csv").write_text("a,b\nthree,3\n")
    assert run(tmp_path, tmp_path / "out", "--text", "a", "--max-rejects", "0.4") == 0
    found = [(record["file"], record["row"]) for record in records(tmp_path / "out").values()]
    assert sorted(found) == [("a.csv", 4), ("b.csv", 2)]
    assert [(reject["file"], reject["row"]) for reject in rejects(tmp_path / "out")] == [("a.csv", "5")]
