"""Symile-MIMIC's arrays: pictures and signals come back exactly, admissions once, candidates as the release drew them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.candidates import accuracy, read_candidates
from data_prep.symile_mimic import main, xray_png
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.errors import DataError
from tests.data_prep.releases import MEAN, STD, write_symile_mimic, xray


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("mimic")
    root, out = write_symile_mimic(folder / "release"), folder / "out"
    assert main(["--root", str(root), "--out", str(out), "--workers", "1"]) == 0
    return Index.load(out)


def test_admissions_come_once_and_back_exactly(index: Index) -> None:
    assert {name: len(Samples(index, name)) for name in index.splits} == {"train": 8, "val": 10, "test": 12}
    samples = Samples(index, "test")
    for number in (0, 11):
        admission = 18 + number
        assert json.loads(samples.read(number, "json"))["hadm_id"] == 20000 + admission
        picture = Image.open(io.BytesIO(samples.read(number, "png")))
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), xray(admission))
        ecg = decode("array", "ecg.npy", samples.read(number, "ecg.npy"), "")
        assert ecg.shape == (12, 64) and ecg.dtype == np.float32
        assert np.array_equal(ecg[:, 5], (admission / 1000 + np.arange(12, dtype=np.float32)).astype(np.float32))
        labs = decode("array", "labs.npy", samples.read(number, "labs.npy"), "")
        assert labs.shape == (50,) and np.array_equal(np.isnan(labs), (admission + np.arange(50)) % 2 == 1)
        assert set(labs[np.isfinite(labs)].tolist()) == {0.25}


def test_candidates_are_those_of_the_release_with_the_right_one_first(index: Index) -> None:
    test, val, train = (Samples(index, name) for name in ("test", "val", "train"))
    record = json.loads(test.read(2, "json"))
    assert record["candidates"] == [20020, *range(20021, 20030)]
    assert len(json.loads(val.read(9, "json"))["candidates"]) == 10 and "candidates" not in json.loads(
        train.read(0, "json")
    )
    numbers, left_out = read_candidates(test)
    assert left_out == 0 and numbers[2] == list(range(2, 12)) and numbers[11][:3] == [11, 0, 1]
    with pytest.raises(DataError, match="no sample has candidates"):
        read_candidates(train)


def test_accuracy_is_among_the_own_candidates() -> None:
    """Computed by hand: query 0 finds its own, query 1 is beaten by sample 0, query 2 ties and so does not count."""
    rows = {"x": torch.tensor([[3.0], [1.0], [2.0], [2.0]]), "q": torch.ones(4, 1)}

    class Product:
        def score(self, *, target: str, candidates: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
            return given["q"] @ candidates.T

    assert accuracy(rows, Product(), [[0, 1, 2], [1, 0], [2, 3]], ["q"], "x") == [True, False, False]


def test_findings_are_labels_where_they_are_certain(index: Index) -> None:
    samples = Samples(index, "train")
    found = [json.loads(samples.read(number, "json")).get("Edema") for number in range(4)]
    assert found == ["positive", "negative", None, None]
    assert index.labels["Edema"].classes == ["negative", "positive"]


def test_an_xray_that_was_not_normalised_so_is_refused() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (3, 4, 5))
    whole = (colours / 255 - MEAN.reshape(3, 1, 1)) / STD.reshape(3, 1, 1)
    picture = np.asarray(Image.open(io.BytesIO(xray_png(whole.astype(np.float32), ""))))
    assert np.array_equal(picture.transpose(2, 0, 1), colours)
    for wrong in (whole * 1.01, whole - 9, np.full((3, 4, 5), np.nan), np.zeros((1, 4, 5))):
        with pytest.raises(DataError, match="X-ray"):
            xray_png(wrong.astype(np.float32), "row 0")


def test_a_damaged_row_is_listed(tmp_path: Path) -> None:
    root, out = write_symile_mimic(tmp_path / "release"), tmp_path / "out"
    file = root / "data_npy" / "train" / "ecg_train.npy"
    signals = np.load(file)
    signals[3, 0, 7, 1] = np.nan
    np.save(file, signals)
    assert main(["--root", str(root), "--out", str(out), "--workers", "2", "--shard-entries", "3"]) == 0
    rejects = list(csv.DictReader((out / "rejects.csv").open()))
    assert [(row["split"], row["entry"], row["where"]) for row in rejects] == [("train", "3", "train row 3")]
    assert len(Samples(Index.load(out), "train")) == 7


@pytest.mark.parametrize("case", ["folder", "missing", "short", "pickle", "shape", "width"])
def test_wrong_layout_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_symile_mimic(tmp_path / "release")
    arrays = root / "data_npy"
    if case == "folder":
        root, message = arrays, "not the layout of Symile-MIMIC"
    elif case == "missing":
        (arrays / "val" / "labs_missingness_val.npy").unlink()
        message = "no such file"
    elif case == "short":
        np.save(arrays / "val" / "hadm_id_val.npy", np.arange(3))
        message = "different lengths"
    elif case == "pickle":
        np.save(arrays / "train" / "hadm_id_train.npy", np.array([{}] * 8, dtype=object), allow_pickle=True)
        message = "no array"
    elif case == "width":
        np.save(
            arrays / "val" / "labs_missingness_val.npy", np.load(arrays / "val" / "labs_missingness_val.npy")[:, 1:]
        )
        message = "labs_percentiles and labs_missingness of val have different widths"
    else:
        np.save(arrays / "train" / "cxr_train.npy", np.zeros((8, 4), dtype=np.float32))
        message = "an array [8, 4] of float32"
    assert main(["--root", str(root), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("subject_id,Edema\n1,1.0\n", "no column hadm_id"),
        ("hadm_id,Edema\n,1.0\n", "hadm_id or a finding is no number"),
        ("hadm_id,Edema\ninf,1.0\n", "hadm_id or a finding is no number"),
        ("hadm_id,Edema\n20001,yes\n", "hadm_id or a finding is no number"),
    ],
)
def test_odd_tables_are_one_line(table: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_symile_mimic(tmp_path / "release")
    (root / "val.csv").write_text(table)
    assert main(["--root", str(root), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("case", ["no right answer", "lengths", "no number"])
def test_candidates_that_contradict_themselves_are_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_symile_mimic(tmp_path / "release")
    path = root / "data_npy" / "test" / ("hadm_id_test.npy" if case == "no number" else "label_test.npy")
    array = np.load(path)
    if case == "no right answer":
        array[5] = 0  # of the sixth admission alone; its own X-ray is the first of its candidates no more
        order = np.r_[6 : len(array), :6]
        for name in ("label", "label_hadm_id", "hadm_id", "cxr", "ecg", "labs_percentiles", "labs_missingness"):
            other = path.with_name(f"{name}_test.npy")
            np.save(other, (array if name == "label" else np.load(other))[order])
        message = "no right answer among the candidates of 20023"
    elif case == "lengths":
        np.save(path, array[:-1])
        message = "hadm_id, label_hadm_id, label of test have different lengths"
    else:
        np.save(path, np.where(np.arange(len(array)) == 3, np.nan, array))
        message = "admissions of test without a number"
    assert main(["--root", str(root), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_candidates_that_a_limit_left_out_are_counted(tmp_path: Path) -> None:
    root = write_symile_mimic(tmp_path / "release")
    for limit, left in ((11, 11 - 2), (9, 9)):
        out = tmp_path / str(limit)
        assert main(["--root", str(root), "--out", str(out), "--workers", "1", "--limit", str(limit)]) == 0
        samples = Samples(Index.load(out), "test")
        if limit == 9:
            with pytest.raises(DataError, match="each of 9 queries lacks a candidate in the split"):
                read_candidates(samples)
        else:
            assert read_candidates(samples)[1] == left
