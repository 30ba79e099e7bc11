"""Symile-MIMIC, a chest X-ray, an electrocardiogram and 50 laboratory values an admission -> shards.

``python -m data_prep.symile_mimic --root symile-mimic-1.0.0 --out data/symile_mimic`` reads the arrays of the release,
``data_npy/train/cxr_train.npy`` and so on, mapped into memory and never loaded whole. An X-ray becomes the PNG that it was
before it was normalised; an electrocardiogram ``[1, 5000, 12]`` becomes ``[12, 5000]``; a laboratory value that was not
measured becomes NaN. The ten candidates of a query, of val_retrieval and test, are in its JSON: see `data_prep.candidates`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.building.read_file import is_passing
from data_prep.release_command import make_parser, run
from data_prep.released_files import expect_folder, provenance, read_csv
from data_prep.samples import Members, Release
from mmrep.errors import DataError

PARTS = ("cxr", "ecg", "labs_percentiles", "labs_missingness", "hadm_id")
SHAPES = {
    "cxr": 4,
    "ecg": 4,
    "labs_percentiles": 2,
    "labs_missingness": 2,
    "hadm_id": 1,
    "label": 1,
    "label_hadm_id": 1,
}
"""Dimensions of each array."""
FINDINGS = ("Atelectasis", "Cardiomegaly", "Edema", "Lung Opacity", "No Finding", "Pleural Effusion")
"""CheXpert's labels that the tables of the release keep: 1 positive, 0 negative, -1 uncertain, or empty."""
STATES = {1.0: "positive", 0.0: "negative"}
MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], dtype=np.float32).reshape(3, 1, 1)
"""ImageNet's, by which the release normalised its X-rays."""
LEADS = 12
TOLERANCE = 0.05
"""How far a pixel may lie from a whole number of 0 to 255: float32 leaves less than 0.001."""
LAYOUT = "expected are data_npy/train/cxr_train.npy and its fellows, and train.csv, as in release 1.0.0"
LICENCES = {"release": "PhysioNet, credentialed access: under its data use agreement only, shards included"}


@dataclass(frozen=True)
class Arrays:
    """The arrays of a split, mapped; ``rows`` are the admissions, once each."""

    split: str
    arrays: Mapping[str, np.ndarray]
    rows: np.ndarray
    candidates: Mapping[int, Sequence[int]]
    findings: Mapping[int, Mapping[str, str]]


def read(options: argparse.Namespace) -> Release:
    """The release in a folder.

    Raises:
        DataError: If the arrays are missing, of other shapes, or contradict each other.
    """
    root: Path = options.root
    expect_folder(root, "Symile-MIMIC", [root / "data_npy" / "train" / "cxr_train.npy"], LAYOUT)
    splits = {
        "train": _arrays(root, "train", None),
        "val": _arrays(root, "val", "val_retrieval"),
        "test": _arrays(root, "test", "test"),
    }
    tables = [root / f"{split}.csv" for split in splits if (root / f"{split}.csv").is_file()]
    return Release(
        "symile-mimic",
        {split: _Admissions(arrays) for split, arrays in splits.items()},
        [*tables, *sorted((root / "data_npy").glob("*/*.npy"))],
        make,
        {"cxr": (("png",), "image"), "ecg": (("ecg.npy",), "array"), "labs": (("labs.npy",), "array")},
        group_key="hadm_id",
        labels={finding: tuple(sorted(STATES.values())) for finding in FINDINGS} if tables else {},
        provenance=provenance(*tables) | {"admissions": {name: len(a.rows) for name, a in splits.items()}},
        licences=LICENCES,
    )


class _Admissions(Sequence[tuple[Arrays, int]]):
    """The admissions of a split by number; an entry is the arrays and a row of them."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays.rows)

    def __getitem__(self, number: Any) -> Any:
        return self.arrays, int(self.arrays.rows[number])


def _arrays(root: Path, split: str, retrieval: str | None) -> Arrays:
    arrays = {part: _map(root, split, part) for part in PARTS}
    lengths = {part: len(array) for part, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the arrays of {split} have different lengths: {lengths}", where=root, fix="fetch them again")
    if arrays["labs_percentiles"].shape != arrays["labs_missingness"].shape:
        what = f"labs_percentiles and labs_missingness of {split} have different widths"
        raise DataError(what, where=root, fix="fetch them again")
    if not np.isfinite(arrays["hadm_id"]).all():
        raise DataError(f"admissions of {split} without a number", where=root, fix="fetch the arrays again")
    # The test arrays repeat each admission as a wrong candidate of others; the first row of each is its own.
    _, rows = np.unique(np.asarray(arrays["hadm_id"]), return_index=True)
    candidates = _candidates(root, retrieval) if retrieval is not None else {}
    return Arrays(split, arrays, np.sort(rows), candidates, _findings(root / f"{split}.csv"))


def _map(root: Path, split: str, part: str) -> np.ndarray:
    path = root / "data_npy" / split / f"{part}_{split}.npy"
    if not path.is_file():
        raise DataError("no such file", where=path, fix=LAYOUT)
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, OSError) and is_passing(error):
            raise
        raise DataError(f"no array ({error})", where=path, fix="fetch it again") from error
    if array.ndim != SHAPES[part] or array.dtype.kind not in "if":
        raise DataError(f"an array {list(array.shape)} of {array.dtype}", where=path, fix=LAYOUT)
    return array


def _candidates(root: Path, split: str) -> dict[int, list[int]]:
    """Admission -> the admissions among whose X-rays its own is to be found, its own first."""
    names = ("hadm_id", "label_hadm_id", "label")
    shown, asked, right = (np.asarray(_map(root, split, name)).tolist() for name in names)
    folder, found = root / "data_npy" / split, dict[int, list[int]]()
    if not len(shown) == len(asked) == len(right):
        raise DataError(f"{', '.join(names)} of {split} have different lengths", where=folder, fix="fetch them again")
    for candidate, query, label in sorted(zip(shown, asked, right, strict=True), key=lambda row: -row[2]):
        if label and candidate != query:
            raise DataError(f"the right answer of {query} is {candidate}", where=folder)
        found.setdefault(query, []).append(candidate)
    if wrong := [query for query, candidates in found.items() if candidates[0] != query]:
        raise DataError(f"no right answer among the candidates of {wrong[0]}", where=folder, fix="fetch them again")
    return found


def _findings(table: Path) -> dict[int, dict[str, str]]:
    """Admission -> its findings that are certain."""
    if not table.is_file():
        return {}
    rows = read_csv(table, ("hadm_id",))
    try:
        return {
            int(float(row["hadm_id"])): {
                finding: STATES[float(row[finding])]
                for finding in FINDINGS
                if row.get(finding) and float(row[finding]) in STATES
            }
            for row in rows
        }
    except (ValueError, OverflowError) as error:
        raise DataError(f"hadm_id or a finding is no number ({error})", where=table, fix="fetch it again") from error


def make(split: str, entry: tuple[Arrays, int]) -> list[Members]:
    """The sample of an admission."""
    from mmrep.data.writer import npy_bytes

    arrays, row = entry
    admission = int(arrays.arrays["hadm_id"][row])
    where = f"{split} row {row}"
    record: dict[str, Any] = {"hadm_id": admission, "row": row} | dict(arrays.findings.get(admission, {}))
    if admission in arrays.candidates:
        record["candidates"] = list(arrays.candidates[admission])
    return [
        {
            "json": record,
            "png": xray_png(np.asarray(arrays.arrays["cxr"][row]), where),
            "ecg.npy": npy_bytes(leads_first(np.asarray(arrays.arrays["ecg"][row]), where)),
            "labs.npy": npy_bytes(
                np.where(
                    np.asarray(arrays.arrays["labs_missingness"][row]) == 1,
                    np.asarray(arrays.arrays["labs_percentiles"][row]),
                    np.nan,
                ).astype(np.float32)
            ),
        }
    ]


def xray_png(normalised: np.ndarray, where: object) -> bytes:
    """An X-ray ``[3, H, W]``, normalised by ImageNet's mean and deviation, as the grey or coloured PNG that it was.

    Raises:
        DataError: If it is not such a picture.
    """
    from PIL import Image

    if normalised.ndim != 3 or normalised.shape[0] != 3:
        raise DataError(f"an X-ray {list(normalised.shape)}", where=where)
    levels = (normalised * STD + MEAN) * 255
    pixels = np.rint(levels)
    if (
        not np.isfinite(levels).all()
        or np.abs(levels - pixels).max() > TOLERANCE
        or not 0 <= pixels.min() <= pixels.max() <= 255
    ):
        raise DataError("an X-ray that is no picture normalised by ImageNet's mean and deviation", where=where)
    whole = pixels.astype(np.uint8)
    grey = bool((whole[0] == whole[1]).all() and (whole[0] == whole[2]).all())
    buffer = io.BytesIO()
    Image.fromarray(whole[0] if grey else np.ascontiguousarray(whole.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def leads_first(signal: np.ndarray, where: object) -> np.ndarray:
    """An electrocardiogram ``[1, time, 12]`` as ``[12, time]``.

    Raises:
        DataError: If it has another shape, or is not finite.
    """
    if signal.ndim != 3 or signal.shape[0] != 1 or signal.shape[2] != LEADS or not np.isfinite(signal).all():
        raise DataError(f"an electrocardiogram {list(signal.shape)}, or one that is not finite", where=where)
    return np.ascontiguousarray(signal[0].T, dtype=np.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = make_parser("symile_mimic", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the release")
    return run(parser, read, argv)


if __name__ == "__main__":
    sys.exit(main())
