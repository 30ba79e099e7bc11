"""Pictures or clips that have several captions each: how they become samples.

For training every caption is a sample of its own with the picture, since a batch needs pairs. In the other splits the picture
is stored once, with its first caption; the other captions are samples of text alone. All share the group, so that retrieval has
each picture once in its gallery and asks once by it, while every caption asks, as the field counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.released_files import read_member
from data_prep.samples import Members
from mmrep.errors import ConfigError, DataError

PICTURE = (("jpg", "jpeg", "png", "webp"), "image")
CLIP = (("wav", "flac", "ogg", "mp3"), "audio")
CAPTION = (("txt",), "text")


@dataclass(frozen=True)
class Captioned:
    """A file with its captions.

    Args:
        path: The picture or clip.
        captions: All of them, in the order of the release.
        record: What the JSON of its samples says; has the group key.
    """

    path: Path
    captions: Sequence[str]
    record: dict[str, Any]


def captioned_samples(
    kind: str, *, train_captions: int | None = None, image_size: int | None = None
) -> Callable[[str, Captioned], list[Members]]:
    """What makes samples of a `Captioned`, for `data_prep.samples.Release`.

    Args:
        kind: ``image`` or ``audio``.
        train_captions: At most so many captions of each are used for training; by default all.
        image_size: Pictures are shrunk until the shorter side has at most so many pixels.

    Raises:
        ConfigError: If a number is below 1.
    """
    if min(1 if train_captions is None else train_captions, 1 if image_size is None else image_size) < 1:
        raise ConfigError(f"--train-captions {train_captions}, --image-size {image_size}", fix="give at least 1")

    def make(split: str, entry: Captioned) -> list[Members]:
        captions = [caption.strip() for caption in entry.captions if caption.strip()]
        if not captions:
            raise DataError("no caption", where=entry.path)
        extension, data = read_member(kind, entry.path, image_size)
        train = split == "train"
        return [
            {"txt": caption, "json": entry.record | {"caption": place}}
            | ({extension: data} if train or not place else {})
            for place, caption in enumerate(captions[: train_captions if train else None])
        ]

    return make


def files_of(splits: Mapping[str, Sequence[Captioned]]) -> Iterator[Path]:
    """The pictures or clips of all splits."""
    return (entry.path for entries in splits.values() for entry in entries)


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """``--train-captions``."""
    parser.add_argument(
        "--train-captions",
        type=int,
        metavar="N",
        help="use at most N captions of each for training (default: all; the file is stored once for each)",
    )
