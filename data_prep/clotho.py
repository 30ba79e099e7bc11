"""Clotho, clips of 15 to 30 seconds with five captions each -> shards.

``python -m data_prep.clotho --root CLOTHO --out data/clotho`` reads ``clotho_captions_development.csv`` and its fellows, and
the clips in ``development/``, ``validation/`` and ``evaluation/``, which become the splits train, val and test. Where
``clotho_metadata_development.csv`` is there too, each sample says whose clip it is and under which licence.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.captions import CAPTION, CLIP, Captioned, add_caption_options, captioned_samples, files_of
from data_prep.release_command import make_parser, run
from data_prep.released_files import expect_folder, inside, provenance, read_csv
from data_prep.samples import Release

SPLITS = {"train": "development", "val": "validation", "test": "evaluation"}
CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
METADATA = ("keywords", "sound_link", "manufacturer", "license")
"""Columns of the metadata that the samples' JSON keeps."""
LAYOUT = "expected are clotho_captions_development.csv and development/*.wav, likewise of validation and evaluation"
LICENCES = {
    "captions": "Tampere University licence, in the LICENSE file of the release",
    "audio": "Freesound: Creative Commons licences, one a clip; see 'license' in each sample's JSON",
}


def read(options: argparse.Namespace) -> Release:
    """The release in a folder.

    Raises:
        DataError: If it has no captions, or they are not of the layout.
    """
    root: Path = options.root
    files = {split: root / f"clotho_captions_{name}.csv" for split, name in SPLITS.items()}
    expect_folder(root, "Clotho", list(files.values()), LAYOUT)
    found = {split: file for split, file in files.items() if file.is_file()}  # version 1 has no validation
    splits = {split: _clips(root, SPLITS[split], file) for split, file in found.items()}
    return Release(
        "clotho",
        splits,
        [*found.values(), *(_metadata(root, SPLITS[split]) for split in found), *files_of(splits)],
        captioned_samples("audio", train_captions=options.train_captions),
        {"audio": CLIP, "text": CAPTION},
        group_key="clip",
        provenance=provenance(*found.values()) | {"train_captions": options.train_captions},
        licences=LICENCES,
    )


def _metadata(root: Path, name: str) -> Path:
    return root / f"clotho_metadata_{name}.csv"


def _clips(root: Path, name: str, file: Path) -> list[Captioned]:
    metadata = _metadata(root, name)
    known = {}
    if metadata.is_file():
        rows = read_csv(metadata, ("file_name", *METADATA))
        known = {row["file_name"].strip(): {column: row[column] for column in METADATA} for row in rows}
    clips = []
    for row in read_csv(file, ("file_name", *CAPTIONS)):
        clip = row["file_name"].strip()
        record = {"clip": f"{name}/{clip}"} | known.get(clip, {})
        clips.append(Captioned(inside(root / name, clip), [row[column] for column in CAPTIONS], record))
    return clips


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = make_parser("clotho", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the release")
    add_caption_options(parser)
    return run(parser, read, argv)


if __name__ == "__main__":
    sys.exit(main())
