"""CMU-MOSEI's computational sequences: segments, alignment to words, labels, and what is not read."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_prep.cmu_mosei import main, read_folds, sentiment_level
from data_prep.computational_sequence import SequenceFile, frames_within, mean_by_interval
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from mmrep.errors import DataError
from tests.data_prep.releases import put, write_cmu_mosei
from tests.tiny import file_bytes

h5py = pytest.importorskip("h5py", reason="pip install 'mmrep[mosei]'")


def words(root: Path, out: Path) -> list[str]:
    folds = ["--folds", str(root / "cmu_mosei_std_folds.py")]
    return ["--root", str(root), *folds, "--out", str(out), "--workers", "1"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("mosei")
    assert main(words(write_cmu_mosei(folder / "csd"), folder / "out")) == 0
    return Index.load(folder / "out")


def array(samples: Samples, number: int, name: str) -> np.ndarray:
    found: np.ndarray = decode("array", f"{name}.npy", samples.read(number, f"{name}.npy"), "")
    return found


def test_a_segment_is_a_sample_of_its_words_and_features(index: Index) -> None:
    assert {name: len(Samples(index, name)) for name in index.splits} == {"train": 8, "val": 4, "test": 4}
    assert set(index.modalities) == {"text", "glove", "covarep", "facet"}
    samples = Samples(index, "train")
    assert samples.read(3, "txt") == b"word10 word12 word13"  # video 1, segment 1; the pause is no word
    shapes = [array(samples, 3, name).shape for name in ("glove", "covarep", "facet")]
    assert shapes == [(300, 3), (74, 3), (35, 3)] and set(array(samples, 3, "glove").ravel().tolist()) == {1.0}
    # Words of 5 frames each, the second one a pause: frames 20 to 24, 30 to 34, 35 to 39 of the video.
    assert array(samples, 3, "covarep")[0].tolist() == [22.0, 32.0, 37.0]
    assert np.isnan(array(samples, 3, "covarep")[1]).all() and array(samples, 3, "covarep")[73, 0] == 22 + 73
    assert [samples.has(number, "facet.npy") for number in range(8)] == [True] * 8
    assert not Samples(index, "val").has(0, "facet.npy")  # video 4 has none


def test_labels_are_the_classes_that_papers_report(index: Index) -> None:
    samples = Samples(index, "train")
    records = [json.loads(samples.read(number, "json")) for number in range(8)]
    assert [record["sentiment7"] for record in records[::2]] == ["-2", "-1", "-1", "0"]
    assert [record["polarity"] for record in records[::2]] == ["negative"] * 3 + ["non-negative"]
    assert [record.get("polarity_nonzero") for record in records[::2]] == ["negative"] * 3 + [None]
    assert [record["happy"] for record in records[:2]] == ["absent", "present"]
    assert records[3]["segment"] == "video_1[1]" and records[3]["interval"] == [2.0, 4.0]
    assert index.labels["sentiment7"].classes == ["-3", "-2", "-1", "0", "1", "2", "3"]


def test_levels_round_as_the_page_of_the_sdk() -> None:
    scores = (-3, -2.01, -2, -1.5, -1, -0.1, 0, 0.1, 1, 1.5, 2, 2.01, 3)
    assert [sentiment_level(score) for score in scores] == [-3, -3, -2, -2, -1, -1, 0, 1, 1, 2, 2, 3, 3]


def test_every_frame_on_demand(tmp_path: Path) -> None:
    root = write_cmu_mosei(tmp_path / "csd")
    (root / "language" / "CMU_MOSEI_TimestampedWords.csd").unlink()
    assert main([*words(root, tmp_path / "out"), "--align", "none"]) == 0
    index = Index.load(tmp_path / "out")
    samples = Samples(index, "train")
    assert array(samples, 3, "covarep").shape == (74, 20) and set(index.modalities) == {"glove", "covarep", "facet"}
    assert array(samples, 3, "covarep")[0].tolist() == list(range(20, 40))


def test_frames_and_means_by_hand() -> None:
    frames, times = np.array([[1.0], [np.inf], [5.0]]), np.array([[0.0, 1.0], [1.0, 2.0], [1.2, 2.6]])
    assert frames_within(frames, times, 0.5, 1.5)[0].tolist() == [[1.0]]
    means = mean_by_interval(frames, times, np.array([[0.0, 2.0], [1.4, 1.6], [7.0, 8.0]]))
    assert means[0].tolist() == [3.0] and np.isnan(means[1:]).all()


def test_folds_are_read_and_not_run(tmp_path: Path) -> None:
    lists = {"train": ["a"], "valid": ["b"], "test": ["c"]}
    expected = {"train": ["a"], "val": ["b"], "test": ["c"]}
    assert read_folds(put(tmp_path / "folds.json", json.dumps(lists))) == expected
    text = "standard_train_fold=['a']\nstandard_valid_fold=['b']\nstandard_test_fold=['c']\n"
    assert read_folds(put(tmp_path / "folds.py", text)) == expected
    for wrong in ("standard_train_fold = open('x', 'w')", "standard_train_fold=[", text.replace("['c']", "[3]")):
        with pytest.raises(DataError, match=r"fold|list of videos"):
            read_folds(put(tmp_path / "wrong.py", wrong))
    assert not Path("x").exists()


def test_a_pickle_is_not_read_and_the_way_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "exploded",)

    put(tmp_path / "csd" / "aligned_50.pkl", pickle.dumps(Bomb()))
    put(tmp_path / "csd" / "cmu_mosei_std_folds.py", "")
    assert main(words(tmp_path / "csd", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "a pickle can run code" in error and "docs/datasets.md" in error and not (tmp_path / "exploded").exists()


def test_damaged_videos_are_listed_and_links_out_of_the_file_are_not_followed(tmp_path: Path) -> None:
    root, out = write_cmu_mosei(tmp_path / "csd"), tmp_path / "out"
    secret = write_cmu_mosei(tmp_path / "other") / "acoustic" / "CMU_MOSEI_COVAREP.csd"
    with h5py.File(root / "acoustic" / "CMU_MOSEI_COVAREP.csd", "r+") as file:
        video = file["COVAREP/data/video_0"]
        del video["features"]
        video["features"] = h5py.ExternalLink(str(secret), "COVAREP/data/video_0/features")
    with h5py.File(root / "labels" / "CMU_MOSEI_Labels.csd", "r+") as file:
        del file["All Labels/data/video_1/intervals"]
        file["All Labels/data/video_2/intervals"][0] = [3, 3]
    assert main(words(root, out)) == 0
    rejects = list(csv.DictReader((out / "rejects.csv").open()))
    assert [(row["split"], row["entry"]) for row in rejects] == [("train", str(n)) for n in (0, 1, 2, 4)]
    assert "leads out of the file" in rejects[0]["reason"] and len(Samples(Index.load(out), "train")) == 3


def test_processes_change_no_byte(tmp_path: Path) -> None:
    root = write_cmu_mosei(tmp_path / "csd")
    for workers in ("1", "2"):
        assert main([*words(root, tmp_path / workers), "--workers", workers, "--shard-entries", "3"]) == 0
    assert file_bytes(tmp_path / "1") == file_bytes(tmp_path / "2")


def test_a_sequence_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    root = write_cmu_mosei(tmp_path / "csd")
    path = root / "visual" / "CMU_MOSEI_VisualFacet42.csd"
    with h5py.File(path, "r+") as file:
        group = file["FACET 4.2/data/video_0"]
        del group["intervals"]
        group["intervals"] = np.zeros((3, 2))
    with pytest.raises(DataError, match=r"features \[40, 35\], intervals \[3, 2\]"):
        SequenceFile(path).read("video_0")
    with pytest.raises(DataError, match="cannot be read"):
        SequenceFile(path).read("nobody")
    with pytest.raises(DataError, match="no computational sequence"):
        SequenceFile(put(tmp_path / "x.csd", b"no HDF5")).read("video_0")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["CMU_MOSEI_Labels.csd"], "not the layout of CMU-MOSEI: none of CMU_MOSEI_Labels.csd"),
        (["CMU_MOSEI_TimestampedWords.csd"], "no CMU_MOSEI_TimestampedWords.csd to align to"),
    ],
)
def test_wrong_layout_is_one_line(
    gone: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_cmu_mosei(tmp_path / "csd")
    for name in gone:
        next(root.rglob(name)).unlink()
    assert main(words(root, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


VIDEO = "COVAREP/data/video_0"


@pytest.mark.parametrize("place", ["COVAREP", "COVAREP/data", VIDEO, f"{VIDEO}/features", f"{VIDEO}/intervals"])
@pytest.mark.parametrize("kind", ["external", "soft"])
def test_no_link_is_followed_at_any_place(place: str, kind: str, tmp_path: Path) -> None:
    """Soft links of the last place alone would do no harm, but may lead over an external one."""
    root, other = write_cmu_mosei(tmp_path / "csd"), write_cmu_mosei(tmp_path / "other")
    path, secret = (folder / "acoustic" / "CMU_MOSEI_COVAREP.csd" for folder in (root, other))
    with h5py.File(path, "r+") as file:
        del file[place]
        if kind == "external":
            file[place] = h5py.ExternalLink(str(secret), place)
        else:
            file.create_group(f"{VIDEO}/others")["away"] = h5py.ExternalLink(str(secret), "/")
            if place in file:
                del file[place]
            file[place] = h5py.SoftLink(f"/{VIDEO}/others/away/{place}")
    with pytest.raises(DataError, match=r"leads out of the file|no computational sequence"):
        SequenceFile(path).read("video_0")


def test_names_of_videos_lead_over_no_link(tmp_path: Path) -> None:
    root, other = write_cmu_mosei(tmp_path / "csd"), write_cmu_mosei(tmp_path / "other")
    path, secret = (folder / "acoustic" / "CMU_MOSEI_COVAREP.csd" for folder in (root, other))
    with h5py.File(path, "r+") as file:
        file["COVAREP/data/away"] = h5py.ExternalLink(str(secret), "COVAREP/data")
    assert "away/video_0" not in SequenceFile(path)
    with pytest.raises(DataError, match="leads out of the file"):
        SequenceFile(path).read("away/video_0")


@pytest.mark.parametrize(
    ("case", "message"), [("virtual", "leads out"), ("raw", "leads out"), ("chunk", "chunks of more")]
)
def test_numbers_that_lie_elsewhere_or_unpack_without_bound_are_refused(
    case: str, message: str, tmp_path: Path
) -> None:
    path = write_cmu_mosei(tmp_path / "csd") / "acoustic" / "CMU_MOSEI_COVAREP.csd"
    secret = write_cmu_mosei(tmp_path / "other") / "acoustic" / "CMU_MOSEI_COVAREP.csd"
    name = f"{VIDEO}/features"
    with h5py.File(path, "r+") as file:
        shape = file[name].shape
        del file[name]
        if case == "virtual":
            layout = h5py.VirtualLayout(shape, np.float32)
            layout[...] = h5py.VirtualSource(str(secret), name, shape)
            file.create_virtual_dataset(name, layout)
        elif case == "raw":
            file.create_dataset(name, shape, np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
        else:
            file.create_dataset(name, shape, np.float32, chunks=(1 << 13, 1 << 12), maxshape=(None, None))
    with pytest.raises(DataError, match=message):
        SequenceFile(path).read("video_0")


def test_scores_or_features_of_text_are_rejects(tmp_path: Path) -> None:
    root, out = write_cmu_mosei(tmp_path / "csd"), tmp_path / "out"
    for path, place, shape in (
        ("labels/CMU_MOSEI_Labels.csd", "All Labels/data/video_0/features", (2, 7)),
        ("labels/CMU_MOSEI_Labels.csd", "All Labels/data/video_1/intervals", (2, 2)),
        ("acoustic/CMU_MOSEI_COVAREP.csd", "COVAREP/data/video_2/features", (40, 74)),
    ):
        with h5py.File(root / path, "r+") as file:
            del file[place]
            file[place] = np.full(shape, b"good")
    assert main(words(root, out)) == 0
    rejects = list(csv.DictReader((out / "rejects.csv").open()))
    assert [(row["split"], row["entry"]) for row in rejects] == [("train", str(n)) for n in (0, 1, 2, 3)]
    assert "covarep [20, 74]" in rejects[2]["reason"] or "covarep [40, 74]" in rejects[2]["reason"]
