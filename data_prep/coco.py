"""COCO captions, and Flickr30k and Flickr8k by Karpathy's splits -> shards.

``python -m data_prep.coco --root COCO --out data/coco`` reads the release of 2017 or 2014:
``annotations/captions_train2017.json``, ``captions_val2017.json`` and the folders of pictures beside. With ``--karpathy FILE``
it reads ``dataset_coco.json``, ``dataset_flickr30k.json`` or ``dataset_flickr8k.json``; ``restval`` is part of training, as the
field has it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.captions import CAPTION, PICTURE, Captioned, add_caption_options, captioned_samples, files_of
from data_prep.release_command import make_parser, run
from data_prep.released_files import expect_folder, inside, provenance, read_json
from data_prep.samples import Release
from mmrep.errors import DataError

YEARS = ("2017", "2014")
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
PICTURE_FOLDERS = (".", "images", "flickr30k-images", "flickr30k_images", "Flicker8k_Dataset", "Flickr8k_Dataset")
"""Where the pictures of Karpathy's files are looked for, below the root."""
LAYOUT = "expected are annotations/captions_train2017.json, captions_val2017.json, train2017/ and val2017/, or --karpathy FILE"
LICENCES = {
    "annotations": "COCO: CC BY 4.0, the COCO Consortium; Flickr30k and Flickr8k: see their pages",
    "pictures": "of their authors on Flickr; use as Flickr's terms allow",
}


def read(options: argparse.Namespace) -> Release:
    """The release that the options name.

    Raises:
        DataError: If the folder or the annotations are not of the layout.
    """
    root: Path = options.root
    if options.karpathy is not None:
        splits, files = _karpathy(root, options.karpathy), [options.karpathy]
    else:
        splits, files = _official(root)
    return Release(
        "coco" if options.karpathy is None else options.karpathy.stem,
        splits,
        [*files, *files_of(splits)],
        captioned_samples("image", train_captions=options.train_captions, image_size=options.image_size),
        {"image": PICTURE, "text": CAPTION},
        group_key="image_id",
        provenance=provenance(*files) | {"train_captions": options.train_captions, "image_size": options.image_size},
        licences=LICENCES,
    )


def _official(root: Path) -> tuple[dict[str, list[Captioned]], list[Path]]:
    annotations = {year: root / "annotations" / f"captions_train{year}.json" for year in YEARS}
    expect_folder(root, "COCO captions", list(annotations.values()), LAYOUT)
    year = next(year for year in YEARS if annotations[year].is_file())
    files = {split: root / "annotations" / f"captions_{split}{year}.json" for split in ("train", "val")}
    return {split: _captions(file, root, f"{split}{year}") for split, file in files.items()}, list(files.values())


def _captions(file: Path, root: Path, folder: str) -> list[Captioned]:
    """The pictures of one annotation file in its order, each with its captions by their numbers."""
    content = read_json(file)
    try:
        captions: dict[int, list[tuple[int, str]]] = {int(image["id"]): [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append((annotation["id"], str(annotation["caption"])))
        return [
            Captioned(
                inside(root / folder, image["file_name"]),
                [text for _, text in sorted(captions[image["id"]])],
                {"image_id": image["id"], "file": f"{folder}/{image['file_name']}"},
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"not the form of COCO's captions ({error!r})", where=file, fix="fetch it again") from error


def _karpathy(root: Path, file: Path) -> dict[str, list[Captioned]]:
    expect_folder(root, "the pictures of Karpathy's splits", [root], "give the folder above train2014/ and val2014/")
    content, splits = read_json(file), dict[str, list[Captioned]]()
    try:
        for image in content["images"]:
            number = image.get("cocoid", image["imgid"])
            record = {"image_id": number, "file": image["filename"], "split": image["split"]}
            captions = [str(sentence["raw"]) for sentence in image["sentences"]]
            found = Captioned(_picture(root, image), captions, record)
            splits.setdefault(KARPATHY_SPLITS[image["split"]], []).append(found)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise DataError(f"not the form of Karpathy's splits ({error!r})", where=file, fix="fetch it again") from error
    return splits


def _picture(root: Path, image: dict[str, Any]) -> Path:
    """Where a picture of Karpathy's file lies; the first place where it is not, so that the reject names one."""
    places = list(_places(root, image))
    return next((place for place in places if place.is_file()), places[0])


def _places(root: Path, image: dict[str, Any]) -> Iterator[Path]:
    for folder in PICTURE_FOLDERS:
        if image.get("filepath"):
            yield inside(root, f"{folder}/{image['filepath']}/{image['filename']}")
        yield inside(root, f"{folder}/{image['filename']}")
    if "cocoid" in image:  # the release of 2017 has the same pictures, by other names
        yield from (root / folder / f"{int(image['cocoid']):012d}.jpg" for folder in ("train2017", "val2017"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = make_parser("coco", __doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the release")
    parser.add_argument(
        "--karpathy", type=Path, metavar="FILE", help="dataset_coco.json, or that of Flickr30k or Flickr8k"
    )
    parser.add_argument("--image-size", type=int, metavar="N", help="shrink pictures to N pixels on the shorter side")
    add_caption_options(parser)
    return run(parser, read, argv)


if __name__ == "__main__":
    sys.exit(main())
