"""Indexed shards as a folder of CLIP_benchmark's, so that its own program can evaluate on them.

``python -m data_prep.clip_benchmark --data DIR --split test --label NAME --out OUT`` writes a set for zero-shot classification,
``--retrieval`` in place of ``--label`` one for retrieval. Further splits may be added to the same folder.

A caption of that layout is right for one picture alone. Of a group, samples that are right answers to each other, a set for
retrieval therefore has the first picture, with the distinct captions of the whole group; a caption that an earlier picture has
is left out. Pictures are copied as they are, but for those that a reader without regard to transparency or a camera's
orientation would see differently, which become plain PNG.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrep.errors import DataError, MmrepError, did_you_mean
from mmrep.files import replacing

SHARD_SAMPLES = 10_000


@dataclass(frozen=True)
class _Nothing:
    """In place of an encoder: the data layer then only says what a sample has."""

    kind: str

    def preprocess(self, train: bool) -> Callable[[Any], Any]:
        import torch

        return lambda raw: torch.zeros(0)

    def blank(self, train: bool) -> Any:
        import torch

        return torch.zeros(0)


@dataclass
class _Picture:
    """A sample to write: its number, its class, its captions."""

    number: int
    label: int = -1
    captions: list[str] = field(default_factory=list)


def convert(
    data: Path | str,
    split: str,
    out: Path,
    *,
    label: str | None = None,
    image: str = "image",
    text: str = "text",
    overwrite: bool = False,
) -> int:
    """Write a split; gives the number of pictures.

    Args:
        data: Folder with an index.json.
        split: Which of its splits.
        out: Folder of the data set.
        label: The label for classification; None for retrieval.
        image, text: The modalities.
        overwrite: Whether the split in ``out`` may be replaced.

    Raises:
        DataError: If a label or modality is missing, names are not one line each, or the split is there already.
    """
    from mmrep.data.index import Index
    from mmrep.data.reader import Samples
    from mmrep.data.writer import write_shard

    samples = Samples(Index.load(data), split)
    for name in (image,) if label is not None else (image, text):
        if name not in samples.index.modalities:
            raise DataError(f"no modality '{name}'", where=data, fix=did_you_mean(name, samples.index.modalities))
    pictures = _labelled(samples, label, image) if label is not None else _captioned(samples, image, text)
    described = _description(samples.index, label)
    _check_type(out, described)
    folder = out / split
    if folder.exists() and not overwrite:
        raise DataError("the split exists", where=folder, fix="choose another --out, or pass --overwrite")
    members = (_members(samples, picture, image, label is None) for picture in pictures)
    written = shards = 0
    with replacing(folder) as part:
        part.mkdir()
        while some := list(itertools.islice(members, SHARD_SAMPLES)):
            written += write_shard(part / f"{shards}.tar", some)
            shards += 1
        if not written:
            raise DataError("no sample of the split has what is asked for", where=data)
        (part / "nshards.txt").write_text(f"{shards}\n", encoding="utf-8")
    for name, content in described.items():
        (out / name).write_text(content, encoding="utf-8")
    return written


def _description(index: Any, label: str | None) -> dict[str, str]:
    """The files beside the splits."""
    if label is None:
        return {"dataset_type.txt": "retrieval\n"}
    if label not in index.labels:
        raise DataError(f"no label '{label}'", where=index.folder, fix=did_you_mean(label, index.labels))
    found = index.labels[label]
    for line in (*found.classes, *found.templates):
        if line != line.strip() or len(line.splitlines()) != 1:
            raise DataError(f"{line!r} is not one line without spaces around it", where=index.folder)
    lines = {"classnames.txt": found.classes, "zeroshot_classification_templates.txt": found.templates}
    return {name: "".join(f"{line}\n" for line in content) for name, content in lines.items()}


def _check_type(out: Path, described: Mapping[str, str]) -> None:
    """Refuse to add a split to a data set of another kind, or of other classes."""
    for name in ("dataset_type.txt", "classnames.txt"):
        there = (out / name).read_text(encoding="utf-8") if (out / name).is_file() else None
        if any(out.glob("*/nshards.txt")) and there != described.get(name):
            raise DataError(f"{name} of the folder is another", where=out, fix="choose another --out")


def _labelled(samples: Any, label: str, image: str) -> Iterator[_Picture]:
    """The samples that have the picture and the class."""
    dataset = _dataset(samples, [image])
    for number in range(len(samples)):
        sample = dataset[number]
        if image in sample.values and sample.labels.get(label, -1) >= 0:
            yield _Picture(number, sample.labels[label])


def _captioned(samples: Any, image: str, text: str) -> list[_Picture]:
    """The first picture of each group, with the distinct captions of all samples of the group."""
    from mmrep.data.dataset import GROUP

    dataset, pictures, captions = _dataset(samples, [image, text]), dict[int, _Picture](), dict[int, list[str]]()
    for number in range(len(samples)):
        sample = dataset[number]
        group = sample.labels.get(GROUP, -1 - number)
        if image in sample.values:
            pictures.setdefault(group, _Picture(number))
        if text in sample.values:
            captions.setdefault(group, []).append(" ".join(_text(samples, number, text).splitlines()))
    taken = set[str]()
    for group, picture in pictures.items():
        picture.captions = [c for c in dict.fromkeys(captions.get(group, [])) if c.strip() and c not in taken]
        taken.update(picture.captions)
    return [picture for picture in pictures.values() if picture.captions]


def _dataset(samples: Any, modalities: list[str]) -> Any:
    from mmrep.data.dataset import ShardDataset

    return ShardDataset(samples, {name: _Nothing(samples.index.modalities[name].kind) for name in modalities})


def _text(samples: Any, number: int, modality: str) -> str:
    from mmrep.data.decode import decode

    extension = samples.extension_of(number, modality)
    return str(decode("text", extension, samples.read(number, extension), samples.where(number)))


def _members(samples: Any, picture: _Picture, image: str, retrieval: bool) -> dict[str, Any]:
    extension = samples.extension_of(picture.number, image)
    data = samples.read(picture.number, extension)
    extension, data = _plain(extension, data, samples.where(picture.number))
    about = {"txt": "\n".join(picture.captions)} if retrieval else {"cls": str(picture.label)}
    return {"__key__": f"s{picture.number:07d}", extension: data, **about}


def _plain(extension: str, data: bytes, where: str) -> tuple[str, bytes]:
    """A picture as it is stored, or as PNG where Pillow's own reading differs from ours."""
    import numpy as np
    from PIL import Image

    from mmrep.data.decode import decode

    ours = decode("image", extension, data, where)
    suffix = extension.rsplit(".", 1)[-1]
    if np.array_equal(np.asarray(ours), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))):
        return suffix, data
    buffer = io.BytesIO()
    ours.save(buffer, "PNG")
    return "png", buffer.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Run the command; gives 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.clip_benchmark", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="folder with an index.json")
    parser.add_argument("--split", default="test", help="which split (default: test)")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets SPLIT/0.tar, SPLIT/1.tar, ...")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--label", help="write a set for classification by this label")
    task.add_argument("--retrieval", action="store_true", help="write a set for retrieval")
    parser.add_argument("--modality", default="image", help="of the pictures (default: image)")
    parser.add_argument("--text-modality", default="text", help="of the captions (default: text)")
    parser.add_argument("--overwrite", action="store_true", help="replace the split that --out holds")
    options = parser.parse_args(argv)
    try:
        written = convert(
            options.data,
            options.split,
            options.out,
            label=options.label,
            image=options.modality,
            text=options.text_modality,
            overwrite=options.overwrite,
        )
    except (MmrepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {written} pictures of {options.split}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
