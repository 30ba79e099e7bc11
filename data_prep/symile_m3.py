"""Symile-M3, triples of a picture, a spoken sentence and words of several languages -> shards.

``python -m data_prep.symile_m3 --root symile-m3-5-xs --out data/symile_m3`` reads one configuration of the release: Parquet
files ``train-00000-of-00143.parquet``, ``val-*``, ``test-*`` with the columns lang, audio, image, text, cls, cls_id and
target_text. ``translations.json`` of the release, in the folder or the one above, names the 1,000 classes.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from data_prep.captions import CAPTION, CLIP, PICTURE
from data_prep.release_command import make_parser, run
from data_prep.released_files import check_member, expect_folder, provenance, read_json
from data_prep.samples import Members, Release
from data_prep.table.cell import known_format
from data_prep.table.parquet_files import batches, open_parquet, reading
from mmrep.errors import DataError

SPLITS = ("train", "val", "test")
COLUMNS = ("lang", "audio", "image", "text", "cls", "cls_id", "target_text")
LANGUAGES = ("ar", "el", "en", "hi", "ja", "ko", "te", "th", "uk", "zh-CN")
LAYOUT = "expected are train-*.parquet, val-*.parquet and test-*.parquet of one configuration, such as symile-m3-2-xs"
LICENCES = {
    "release": "CC BY-NC-SA 4.0, Saporta et al. 2024",
    "parts": "the pictures are ImageNet's, the speech Common Voice's: their terms hold too",
}


class ParquetRows(Sequence[dict[str, Any]]):
    """The rows of several Parquet files by number. The batch of the last one is held, so reading in order is cheap.

    Args:
        files: In order; their footers are read here, nothing else.

    Raises:
        DataError: If a file is no Parquet or lacks a column.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        for file in files:
            with reading(file):
                metadata = open_parquet(file).metadata
            if missing := set(COLUMNS) - set(metadata.schema.to_arrow_schema().names):
                raise DataError(f"no column {', '.join(sorted(missing))}", where=file, fix=LAYOUT)
            for number in range(metadata.num_row_groups):
                self.groups.append((file, number))
                sizes.append(metadata.row_group(number).num_rows)
        self.starts: list[int] = [0, *itertools.accumulate(sizes)]
        self._held: tuple[int, _Group] | None = None

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        place = bisect.bisect_right(self.starts, number) - 1
        if self._held is None or self._held[0] != place:
            self._held = place, _Group(*self.groups[place])
        return self._held[1].row(number - self.starts[place]) | {"row": number}


class _Group:
    """A row group, read forward: the last batch is held, and so is the error that ended it."""

    def __init__(self, file: Path, number: int) -> None:
        self.file, self.number = file, number
        self._start()

    def row(self, place: int) -> dict[str, Any]:
        """A row by its place in the group."""
        if place < self.first:
            self._start()
        while self.batch is None or place >= self.first + self.batch.num_rows:
            self._advance()
        row: dict[str, Any] = self.batch.slice(place - self.first, 1).to_pylist()[0]
        return row

    def _start(self) -> None:
        self.batches = batches(self.file, COLUMNS, [self.number])
        self.batch: Any = None
        self.first, self.reason = 0, ""

    def _advance(self) -> None:
        if not self.reason:
            try:
                following = next(self.batches, None)
                self.reason = "fewer rows than the footer says" if following is None else ""
            except DataError as error:
                self.reason = error.what
        if self.reason:
            what = f"row group {self.number} cannot be read ({self.reason})"
            raise DataError(what, where=self.file, fix="fetch it again")
        self.first += 0 if self.batch is None else self.batch.num_rows
        self.batch = following


def read(options: argparse.Namespace) -> Release:
    """The release in a folder.

    Raises:
        DataError: If there is no Parquet file of it.
    """
    root: Path = options.root
    files = {split: sorted(root.glob(f"{split}-*.parquet")) for split in SPLITS}
    found = {split: list(paths) for split, paths in files.items() if paths}
    expect_folder(
        root, "Symile-M3", [p for paths in found.values() for p in paths] or [root / "train-*.parquet"], LAYOUT
    )
    names = {path.name: {"bytes": path.stat().st_size} for paths in found.values() for path in paths}
    translations = next(
        (p for p in (root / "translations.json", root.parent / "translations.json") if p.is_file()), None
    )
    classes = {"cls": class_names(translations)} if translations is not None else {}
    return Release(
        "symile-m3",
        {split: ParquetRows(paths) for split, paths in found.items()},
        [*(path for paths in found.values() for path in paths), *([translations] if translations is not None else [])],
        make,
        {"image": PICTURE, "text": CAPTION, "audio": CLIP},
        group_key="cls_id",
        labels=classes | {"lang": LANGUAGES},
        provenance=names | (provenance(translations) if translations is not None else {}),
        licences=LICENCES,
    )


def class_names(translations: Path) -> list[str]:
    """The classes in the order of their numbers.

    Raises:
        DataError: If the numbers are not 0, 1, 2, ...
    """
    content = read_json(translations)
    try:
        numbers = {int(entry["cls_id"]): name for name, entry in content.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"not the form of Symile-M3's translations ({error!r})", where=translations) from error
    if sorted(numbers) != list(range(len(content))):
        raise DataError("the classes are not numbered 0, 1, 2, ...", where=translations, fix="fetch it again")
    return [numbers[number] for number in range(len(numbers))]


def make(split: str, row: dict[str, Any]) -> list[Members]:
    """The sample of a row: a cell that is null is a modality that the sample lacks."""
    where = f"{split} row {row['row']}"
    facts = {name: row[name] for name in ("cls", "cls_id", "lang", "target_text")}
    if not all(value is None or isinstance(value, str | int) for value in facts.values()):
        raise DataError(f"of cls, cls_id, lang and target_text one is neither text nor number: {facts}", where=where)
    members: dict[str, Any] = {"json": facts | {"row": row["row"]}}
    if row["text"] is not None:
        members["txt"] = str(row["text"])
    for kind in ("image", "audio"):
        cell = row[kind]
        if cell is None:
            continue
        if not isinstance(cell, dict) or not isinstance(cell.get("bytes"), bytes):
            path = cell.get("path") if isinstance(cell, dict) else type(cell).__name__
            raise DataError(f"the {kind} is not in the table", where=f"{where}: {path}")
        extension = known_format(cell["bytes"])
        if not extension:
            raise DataError("bytes of an unknown format", where=where)
        members[extension] = check_member(kind, extension, cell["bytes"], where)[1]
    return [members]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = make_parser("symile_m3", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of one configuration of the release")
    return run(parser, read, argv)


if __name__ == "__main__":
    sys.exit(main())
