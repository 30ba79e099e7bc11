"""Reading the files of a published data set: each is checked once to be what training can read; errors name it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.building.read_file import read_file
from mmrep.errors import DataError

MAX_JSON_BYTES = 1 << 30
"""Of an annotation file; the largest of the field, Karpathy's COCO, has about 150 MB."""
MAX_CSV_BYTES = 1 << 28
"""Of a table; the largest of the field, Symile-MIMIC's, has some 10 MB."""


def expect_folder(root: Path, what: str, needed: Sequence[Path], fix: str) -> None:
    """Refuse a folder that is not of a data set's layout.

    Args:
        root: The folder.
        what: The data set.
        needed: Files or folders of which one at least must be there.
        fix: What the folder should hold.

    Raises:
        DataError: In one line that names what was looked for.
    """
    if not root.is_dir():
        raise DataError(f"no such folder of {what}", where=root, fix=fix)
    if not any(path.exists() for path in needed):
        names = ", ".join(os.path.relpath(path, root) for path in needed)
        raise DataError(f"not the layout of {what}: none of {names}", where=root, fix=fix)


def inside(root: Path, name: str) -> Path:
    """The path of a file that an annotation names: no name leads out of ``root``. A link that the user put there is followed.

    Raises:
        DataError: If it leads elsewhere.
    """
    base = os.path.abspath(root)  # noqa: PTH100 - links are not resolved
    path = Path(os.path.abspath(root / name))  # noqa: PTH100
    if "\0" in name or not path.is_relative_to(base):
        raise DataError("outside the folder of the data set", where=repr(name))
    return root / path.relative_to(base)


def read_member(kind: str, path: Path, image_size: int | None = None) -> tuple[str, bytes]:
    """A file as a member: ``(extension, content)``, decoded once to prove that training can read it.

    Args:
        kind: ``image`` or ``audio``.
        path: The file.
        image_size: A picture is shrunk until its shorter side has at most so many pixels.

    Raises:
        DataError: If it is missing, too large, damaged, or of a format that mmrep does not read.
        OSError: If the file system fails.
    """
    from mmrep.data.decode import MAX_BYTES

    data = read_file(path, MAX_BYTES[kind], path)
    return check_member(kind, path.suffix.removeprefix(".").lower(), data, path, image_size)


def check_member(
    kind: str, extension: str, data: bytes, where: object, image_size: int | None = None
) -> tuple[str, bytes]:
    """Bytes as a member, as `read_member` does a file."""
    from data_prep.building.pictures import shrink
    from mmrep.data.decode import decode

    content = decode(kind, extension, data, where)
    if kind == "image" and image_size is not None and min(content.size) > image_size:
        return shrink(content, extension, image_size)
    return extension, data


def read_json(path: Path) -> Any:
    """The content of an annotation file.

    Raises:
        DataError: If it is missing, too large, or no JSON.
    """
    try:
        return json.loads(read_file(path, MAX_JSON_BYTES, path).decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"no JSON ({error})", where=path, fix="fetch it again") from error


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file by column; bytes that are no UTF-8 are taken as Latin-1, as some releases have them.

    Raises:
        DataError: If it is missing, too large, broken, or lacks a column.
    """
    data = read_file(path, MAX_CSV_BYTES, path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        rows = [{name: value for name, value in row.items() if isinstance(name, str)} for row in reader]
    except csv.Error as error:
        raise DataError(f"no CSV ({error})", where=path, fix="fetch it again") from error
    if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
        raise DataError(f"no column {', '.join(missing)}", where=path, fix=f"there are: {reader.fieldnames}")
    return rows


def provenance(*paths: Path) -> dict[str, Any]:
    """Names, sizes and SHA-256 of the annotation files that a run was made from."""
    found = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found
