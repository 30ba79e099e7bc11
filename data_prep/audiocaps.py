"""AudioCaps, captions of ten seconds of AudioSet clips -> shards.

``python -m data_prep.audiocaps --root CSVS --audio CLIPS --out data/audiocaps`` reads ``train.csv``, ``val.csv``, ``test.csv``.
The release has no audio: the clips are what you have, under the names that your downloader gave them. Clips that are gone are
listed in rejects.csv; results are comparable only between runs with the same clips, so keep the counts that are printed.
"""

from __future__ import annotations

import argparse
import os
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.building.read_file import is_passing
from data_prep.captions import CAPTION, CLIP, Captioned, add_caption_options, captioned_samples, files_of
from data_prep.release_command import make_parser, run
from data_prep.released_files import expect_folder, provenance, read_csv
from data_prep.samples import Release
from mmrep.errors import ConfigError, DataError

SPLITS = ("train", "val", "test")
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
PATTERNS = (
    *("{youtube_id}_{start_time}", "Y{youtube_id}_{start_time}", "{youtube_id}_{start_time}_{end_time}"),
    *("{youtube_id}_{start_ms}_{end_ms}", "{youtube_id}", "Y{youtube_id}", "{audiocap_id}"),
)
"""Names of clips, without the ending, that are looked for: the more exact before the less."""
FIELDS = ("audiocap_id", "youtube_id", "start_time", "end_time", "start_ms", "end_ms")
SECONDS = 10
MAX_DIGITS = 10
"""Of a time."""
LAYOUT = "expected are train.csv, val.csv and test.csv with the columns " + ", ".join(COLUMNS)
LICENCES = {
    "captions": "free for academic purposes only, as the README of the release says",
    "audio": "of the uploaders on YouTube",
}


def read(options: argparse.Namespace) -> Release:
    """The release, with the clips that are there.

    Raises:
        DataError: If there are no tables, or no folder of clips.
        ConfigError: If ``--pattern`` names an unknown field.
    """
    root: Path = options.root
    files = {split: root / f"{split}.csv" for split in SPLITS}
    expect_folder(root, "AudioCaps", list(files.values()), LAYOUT)
    patterns = [_checked(options.pattern)] if options.pattern is not None else list(PATTERNS)
    clips = find_clips(options.audio or root)
    found = {split: file for split, file in files.items() if file.is_file()}
    splits = {split: _captioned(file, clips, patterns) for split, file in found.items()}
    return Release(
        "audiocaps",
        splits,
        [*found.values(), *files_of(splits)],
        captioned_samples("audio", train_captions=options.train_captions),
        {"audio": CLIP, "text": CAPTION},
        group_key="clip",
        provenance=provenance(*found.values()) | {"train_captions": options.train_captions, "clips": len(clips)},
        licences=LICENCES,
    )


def find_clips(folder: Path) -> dict[str, Path]:
    """All audio files below a folder by their names without the ending; one walk instead of many guesses.

    Raises:
        DataError: If there is none.
        OSError: If the file system fails: that says nothing of the clips.
    """
    endings, clips = CLIP[0], dict[str, Path]()
    for place, _, names in sorted(os.walk(folder, onerror=_raise_passing)):
        for name in sorted(names):
            stem, dot, ending = name.rpartition(".")
            if dot and ending.lower() in endings:
                clips.setdefault(stem, Path(place) / name)
    if not clips:
        fix = f"give --audio DIR with files that end in {', '.join(endings)}"
        raise DataError("no audio file below the folder", where=folder, fix=fix)
    return clips


def _raise_passing(error: OSError) -> None:
    if is_passing(error):
        raise error


def _checked(pattern: str) -> str:
    stem = pattern.rpartition(".")[0] if pattern.rpartition(".")[2].lower() in CLIP[0] else pattern
    try:
        fields = [(name, form) for _, name, form, _ in string.Formatter().parse(stem) if name is not None]
    except ValueError as error:
        raise ConfigError(f"--pattern {pattern!r}: {error}") from error
    nested = any("{" in (form or "") for _, form in fields)
    if not fields or nested or {name for name, _ in fields} - set(FIELDS):
        raise ConfigError(f"--pattern {pattern!r} does not name a clip", fix=f"use {{{'}, {'.join(FIELDS)}}}")
    try:
        _name(stem, dict.fromkeys(COLUMNS, "0"))
    except ValueError as error:  # a format that texts do not have
        raise ConfigError(f"--pattern {pattern!r}: {error}") from error
    return stem


def _captioned(file: Path, clips: dict[str, Path], patterns: Sequence[str]) -> list[Captioned]:
    """The rows of a clip together: val and test have five."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in read_csv(file, COLUMNS):
        groups.setdefault(f"{row['youtube_id']}_{row['start_time']}", []).append(row)
    entries = []
    for clip, rows in groups.items():
        record: dict[str, Any] = {name: rows[0][name] for name in ("youtube_id", "start_time")} | {"clip": clip}
        record |= {"audiocap_ids": [row["audiocap_id"] for row in rows]}
        entries.append(Captioned(_clip(rows, clips, patterns), [row["caption"] for row in rows], record))
    return entries


def _clip(rows: Sequence[dict[str, str]], clips: dict[str, Path], patterns: Sequence[str]) -> Path:
    """The file of a clip, or the name under which it was looked for first: the reject then says so."""
    names = [_name(pattern, row) for pattern in patterns for row in rows]
    return next((clips[name] for name in names if name in clips), Path(f"{names[0]}.wav"))


def _name(pattern: str, row: dict[str, str]) -> str:
    text = row["start_time"]
    start = int(text) if text.isdecimal() and len(text) < MAX_DIGITS else 0
    times = {"end_time": start + SECONDS, "start_ms": 1000 * start, "end_ms": 1000 * (start + SECONDS)}
    return pattern.format(**row | times)  # a table may have columns of these names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = make_parser("audiocaps", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of train.csv, val.csv and test.csv")
    parser.add_argument("--audio", type=Path, help="folder of the clips, looked through whole (default: --root)")
    parser.add_argument(
        "--pattern",
        help=f"how clips are named, as '{{youtube_id}}_{{start_time}}' of {', '.join(FIELDS)}; else guessed",
    )
    add_caption_options(parser)
    return run(parser, read, argv)


if __name__ == "__main__":
    sys.exit(main())
