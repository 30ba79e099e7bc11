"""CMU-MOSEI, segments of monologues with sentiment and six emotions -> shards, from the SDK's computational sequences.

``python -m data_prep.cmu_mosei --root CSD --folds cmu_mosei_std_folds.py --out data/cmu_mosei`` reads ``CMU_MOSEI_Labels.csd``
and what is there of the words, the GloVe vectors, COVAREP, FACET and OpenFace (HDF5, by h5py). A sample is a labelled segment:
its words as text, and each feature as an array ``[channels, steps]``, by default one step for each word, the mean of the frames
whose middle lies in it, NaN where there is none; with ``--align none`` one step a frame. The pickled tensors that others made
of them are not read.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.building.read_file import read_file
from data_prep.computational_sequence import SequenceFile, frames_within, mean_by_interval
from data_prep.release_command import make_parser, run
from data_prep.released_files import expect_folder, provenance, read_json
from data_prep.samples import Members, Release
from mmrep.errors import DataError

LABELS = "CMU_MOSEI_Labels.csd"
WORDS = "CMU_MOSEI_TimestampedWords.csd"
FEATURES = {
    "glove": "CMU_MOSEI_TimestampedWordVectors.csd",
    "covarep": "CMU_MOSEI_COVAREP.csd",
    "facet": "CMU_MOSEI_VisualFacet42.csd",
    "openface": "CMU_MOSEI_VisualOpenFace2.csd",
}
DIMENSIONS = ("sentiment", "happy", "sad", "anger", "surprise", "disgust", "fear")
SILENCE = "sp"
MAX_FOLDS_BYTES = 1 << 24
"""Of the SDK's file of folds, which has 50 kB: a parser takes a hundred times as much."""
FOLDS = {"train": "standard_train_fold", "val": "standard_valid_fold", "test": "standard_test_fold"}
"""Split -> what the SDK calls its videos."""
LAYOUT = f"expected are {LABELS} and others of the SDK, in the folder or below"
CLASSES = {
    "sentiment7": tuple(str(level) for level in range(-3, 4)),
    "polarity": ("negative", "non-negative"),
    "polarity_nonzero": ("negative", "positive"),
    **dict.fromkeys(DIMENSIONS[1:], ("absent", "present")),
}
"""The classes that papers report: seven levels, negative or not (before 2019), negative or positive without zero (after)."""
LICENCES = {"release": "CMU Multimodal SDK: research use, see its page; the videos are of their authors on YouTube"}


@dataclass(frozen=True)
class Segment:
    """A labelled segment: its video, its place there, ``start`` and ``end`` in seconds, the seven scores."""

    video: str
    place: int
    start: float
    end: float
    scores: tuple[float, ...]


def read(options: argparse.Namespace) -> Release:
    """The release in a folder.

    Raises:
        DataError: If there are only pickles, no labels, or no features; or the folds are not readable.
    """
    files = _find(options.root)
    folds = read_folds(options.folds)
    labels = SequenceFile(files[LABELS])
    splits = {split: list(_segments(labels, videos)) for split, videos in folds.items()}
    words = SequenceFile(files[WORDS]) if WORDS in files else None
    features = {name: SequenceFile(files[file]) for name, file in FEATURES.items() if file in files}
    if words is None and options.align == "words":
        raise DataError(f"no {WORDS} to align to", where=options.root, fix="fetch it, or pass --align none")
    modalities: dict[str, tuple[tuple[str, ...], str]] = {"text": (("txt",), "text")} if words is not None else {}
    modalities |= {name: ((f"{name}.npy",), "array") for name in features}
    return Release(
        "cmu-mosei",
        splits,
        [*files.values(), options.folds],
        partial(make, words, features, options.align == "words"),
        modalities,
        group_key="segment",
        labels=CLASSES,
        provenance={path.name: {"bytes": path.stat().st_size} for path in files.values()}
        | provenance(options.folds)
        | {"align": options.align},
        licences=LICENCES,
    )


def _find(root: Path) -> dict[str, Path]:
    found = {path.name: path for path in sorted(root.rglob("*.csd"))}
    if root.is_dir() and not found and (pickles := sorted([*root.rglob("*.pkl"), *root.rglob("*.pickle")])):
        raise DataError(
            "a pickle can run code when it is read, and is not",
            where=pickles[0],
            fix="fetch the SDK's .csd files; docs/datasets.md says how to convert a pickle that you trust",
        )
    expect_folder(root, "CMU-MOSEI", [found.get(LABELS, root / LABELS)], LAYOUT)
    if not set(found) & {WORDS, *FEATURES.values()}:
        raise DataError(
            "labels, but no words or features", where=root, fix=f"fetch {WORDS}, {FEATURES['covarep']}, ..."
        )
    return found


def read_folds(file: Path) -> dict[str, list[str]]:
    """Split -> its videos, from JSON ``{"train": [...], "valid": [...], "test": [...]}`` or from the SDK's own Python file, of
    which literal lists are taken and nothing is run.

    Raises:
        DataError: If it is neither.
    """
    content, folds = read_json(file) if file.suffix == ".json" else _literals(file), {}
    for split, theirs in FOLDS.items():
        names = (split, theirs, "valid" if split == "val" else split)
        videos = next((content[name] for name in names if isinstance(content, dict) and name in content), None)
        if not isinstance(videos, list) or not all(isinstance(video, str) for video in videos):
            raise DataError(f"no list of videos of {split}", where=file, fix="give cmu_mosei_std_folds.py of the SDK")
        folds[split] = videos
    return folds


def _literals(file: Path) -> dict[str, Any]:
    text = read_file(file, MAX_FOLDS_BYTES, file)
    try:
        statements = ast.parse(text).body
        return {
            statement.targets[0].id: ast.literal_eval(statement.value)
            for statement in statements
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"not the SDK's file of folds ({error})", where=file) from error


def _segments(labels: SequenceFile, videos: Sequence[str]) -> Iterator[Segment]:
    for video in videos:
        if video not in labels:
            continue  # the folds name videos that the labels lack
        try:
            scores, intervals = labels.read(video)
            scores = scores.astype(float)
        except (DataError, ValueError, TypeError):
            yield Segment(video, 0, 0.0, 0.0, ())  # which `make` refuses, so that it is listed
            continue
        order = np.argsort(intervals[:, 0], kind="stable")
        for place, row in enumerate(order.tolist()):
            start, end = intervals[row].tolist()
            yield Segment(video, place, start, end, tuple(scores[row].ravel().tolist()))


def make(
    words: SequenceFile | None, features: dict[str, SequenceFile], aligned: bool, split: str, segment: Segment
) -> list[Members]:
    """The sample of a segment; a feature without any frame there is a modality that it lacks.

    Raises:
        DataError: If the segment has no length, other scores than seven, or nothing at all.
    """
    from mmrep.data.writer import npy_bytes

    where = f"{segment.video}[{segment.place}]"
    if segment.end <= segment.start or len(segment.scores) != len(DIMENSIONS) or not np.isfinite(segment.scores).all():
        raise DataError(f"from {segment.start} to {segment.end} s with scores {segment.scores}", where=where)
    members: dict[str, Any] = {"json": _record(segment)}
    spoken, spans = _words(words, segment)
    if spoken:
        members["txt"] = " ".join(spoken)
    for name, sequence in features.items():
        if segment.video not in sequence:
            continue
        frames, intervals = sequence.read(segment.video)
        if frames.ndim != 2 or frames.dtype.kind not in "fiu":
            raise DataError(f"{name} {list(frames.shape)} of {frames.dtype}", where=where)
        frames, intervals = frames_within(frames, intervals, segment.start, segment.end)
        if aligned:
            frames = mean_by_interval(frames, intervals, spans)
        if np.isfinite(frames).any():
            members[f"{name}.npy"] = npy_bytes(np.ascontiguousarray(frames.T, dtype=np.float32))
    if len(members) == 1:
        raise DataError("no word and no frame", where=where)
    return [members]


def _words(words: SequenceFile | None, segment: Segment) -> tuple[list[str], np.ndarray]:
    """The words of a segment without pauses, and their intervals ``[N, 2]``."""
    if words is None or segment.video not in words:
        return [], np.zeros((0, 2))
    tokens, intervals = words.read(segment.video)
    tokens, intervals = frames_within(tokens, intervals, segment.start, segment.end)
    texts = [
        token.decode("utf-8", "replace") if isinstance(token, bytes) else str(token) for token in tokens[:, 0].tolist()
    ]
    kept = [place for place, text in enumerate(texts) if text.strip() and text.strip() != SILENCE]
    return [texts[place].strip() for place in kept], intervals[kept]


def _record(segment: Segment) -> dict[str, Any]:
    sentiment, scores = segment.scores[0], dict(zip(DIMENSIONS, segment.scores, strict=True))
    record: dict[str, Any] = {
        "segment": f"{segment.video}[{segment.place}]",
        "video": segment.video,
        "interval": [segment.start, segment.end],
        "scores": scores,
        "sentiment7": str(sentiment_level(sentiment)),
        "polarity": "non-negative" if sentiment >= 0 else "negative",
    }
    if sentiment:
        record["polarity_nonzero"] = "positive" if sentiment > 0 else "negative"
    return record | {name: "present" if scores[name] > 0 else "absent" for name in DIMENSIONS[1:]}


def sentiment_level(score: float) -> int:
    """The level -3 to 3 of a score, rounded away from zero, as the SDK's page has it."""
    if score < 0:
        return max(-3, int(np.floor(score)))
    return min(3, int(np.ceil(score)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = make_parser("cmu_mosei", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the .csd files, looked through whole")
    parser.add_argument("--folds", type=Path, required=True, help="cmu_mosei_std_folds.py of the SDK, or JSON")
    parser.add_argument(
        "--align", choices=("words", "none"), default="words", help="a step for each word (default), or for each frame"
    )
    return run(parser, read, argv)


if __name__ == "__main__":
    sys.exit(main())
