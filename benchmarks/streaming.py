"""``make bench-streaming``: CPU time of the data layer beside an open_clip-like webdataset pipeline, and the machine's limits.

One process, one thread, CPU time, the median of interleaved runs. Both sides give batches of the same pictures, cropped at
random and resized to 224 pixels with bicubic interpolation, and their captions as they are: theirs as open_clip prepares them
(float32, normalised), ours as uint8, which is normalised on the device. Prints the table, writes ``streaming.json``.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import Row, Step, compare, comparison_parser, interleaved
from benchmarks.pictures import SETS, write_pictures
from mmrep.batch import Batch, Input
from mmrep.data.collate import Collate
from mmrep.data.dataset import Preprocessor, ShardDataset
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.member_table import MEMBER
from mmrep.data.order import Contents
from mmrep.data.plan import Plan
from mmrep.data.reader import Samples
from mmrep.encoders.resize import RandomResizedCrop

RESULT = Path("benchmarks/results/streaming.json")
BATCH, SIZE = 250, 224
SMALL, LARGE = SETS


@dataclass(frozen=True)
class Picture:
    """The training side of an image tower: its transform and nothing else."""

    backend: str = "torch"
    kind: str = "image"

    def preprocess(self, train: bool) -> Callable[[Any], Input]:
        return RandomResizedCrop(SIZE, backend=self.backend)

    def blank(self, train: bool) -> Input:
        return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)


@dataclass(frozen=True)
class Caption:
    """Captions cost nothing on either side: no tokenizer."""

    kind: str = "text"

    def preprocess(self, train: bool) -> Callable[[Any], Input]:
        return _length

    def blank(self, train: bool) -> Input:
        return torch.zeros((), dtype=torch.int32)


def _length(text: str) -> Tensor:
    return torch.tensor(len(text), dtype=torch.int32)


@dataclass(frozen=True)
class Shards:
    """A set of pictures on the disk."""

    folder: Path
    files: list[Path]
    count: int


@cache
def shards(name: str, root: Path) -> Shards:
    """Written once for all cases."""
    return Shards(
        root / name.replace(" ", "-"), write_pictures(root / name.replace(" ", "-"), SETS[name]), SETS[name].count
    )


def ours(found: Shards, backend: str = "torch", epoch: int = 0) -> Iterator[Batch]:
    """Planned batches, read, verified, decoded, resized, stacked."""
    samples = Samples(Index.load(found.folder), "train")
    encoders: dict[str, Preprocessor] = {"image": Picture(backend), "text": Caption()}
    dataset = ShardDataset(samples, encoders, train=True, global_batch_size=min(BATCH, found.count))
    collate = Collate({name: encoder.blank(True) for name, encoder in encoders.items()}, dataset.label_names)
    for batch in dataset.plan.batches(epoch):
        loaded = dataset.__getitems__(batch)
        assert isinstance(loaded, list), "the shards are whole"
        yield collate(loaded)


def theirs(found: Shards) -> Iterator[tuple[Tensor, list[str]]]:
    """webdataset's stages in the order of open_clip's pipeline, with open_clip's transform."""
    import open_clip
    import webdataset

    transform = open_clip.image_transform(SIZE, is_train=True)

    def picture(data: bytes) -> Tensor:
        prepared: Tensor = transform(Image.open(io.BytesIO(data)).convert("RGB"))
        return prepared

    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList([str(file) for file in found.files], seed=0),
        webdataset.shuffle(100),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(1000),
        webdataset.to_tuple("jpg", "txt"),
        webdataset.map_tuple(picture, bytes.decode),
        webdataset.batched(
            min(BATCH, found.count), collation_fn=lambda rows: (torch.stack([r[0] for r in rows]), [r[1] for r in rows])
        ),
    )
    yield from pipeline


def read_ours(found: Shards) -> Step:
    """All members of all samples in planned order, checksums verified."""
    samples = Samples(Index.load(found.folder), "train")
    plan = Plan([samples.contents(["image", "text"])], min(BATCH, found.count), 0, True)
    columns = [[column] for column in range(len(samples.index.extensions))]

    def run() -> int:
        return sum(sum(map(len, samples.read_many(batch.samples, columns))) for batch in plan.batches(0))

    return run


def read_theirs(found: Shards) -> Step:
    """The same members, by webdataset."""
    import webdataset

    def run() -> int:
        samples = webdataset.WebDataset([str(file) for file in found.files], shardshuffle=False)
        return sum(not name.startswith("__") for sample in samples for name in sample)

    return run


def drain(make: Callable[[], Iterator[object]]) -> Step:
    """Take everything."""

    def run() -> None:
        for _ in make():
            pass

    return run


def per_sample(name: str, root: Path, rounds: int, steps: Sequence[Step]) -> list[float]:
    """CPU milliseconds a sample."""
    return [1000 * seconds / shards(name, root).count for seconds in interleaved(steps, rounds)]


def pipeline_rows(name: str, backend: str, gate: float, aim: float, root: Path, rounds: int) -> list[Row]:
    found = shards(name, root)
    mine, other = per_sample(name, root, rounds, [drain(partial(ours, found, backend)), drain(partial(theirs, found))])
    case = f"{name}, {'opencv resize' if backend == 'opencv' else 'at Pillow parity'}"
    return [Row.of(case, "CPU ms a sample", mine, other, "open_clip-like webdataset", 1 / gate, 1 / aim)]


def reading_rows(root: Path, rounds: int) -> list[Row]:
    found = shards(SMALL, root)
    mine, other = per_sample(SMALL, root, rounds, [read_ours(found), read_theirs(found)])
    return [Row.of(f"{SMALL}, reading alone with crc32", "CPU ms a sample", mine, other, "webdataset", 1 / 15, 1 / 20)]


def crop_rows(name: str, root: Path, rounds: int) -> list[Row]:
    """Cropping at random and resizing alone, beside torchvision's transform of the same pictures."""
    from torchvision.transforms import InterpolationMode, v2

    samples = Samples(Index.load(shards(name, root).folder), "train")
    pictures = [decode("image", "jpg", samples.read(number, "jpg"), number) for number in range(len(samples))]
    crop = v2.RandomResizedCrop(SIZE, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
    torchvision = v2.Compose([crop, v2.PILToTensor()])

    def each(transform: Callable[[Any], Any]) -> Step:
        return drain(lambda: map(transform, pictures))

    steps = [each(RandomResizedCrop(SIZE)), each(RandomResizedCrop(SIZE, backend="opencv")), each(torchvision)]
    ours_, opencv, theirs_ = per_sample(name, root, rounds, steps)
    against = "torchvision on Pillow"
    return [
        Row.of(f"{name}, crop and resize alone", "CPU ms a sample", ours_, theirs_, against),
        Row.of(f"{name}, crop and resize alone, opencv", "CPU ms a sample", opencv, theirs_, against),
    ]


def limit_rows(name: str, root: Path, rounds: int) -> list[Row]:
    """What reading and decoding cost at least on this machine, as shares of our whole path."""
    found = shards(name, root)
    samples = Samples(Index.load(found.folder), "train")
    stored = [samples.read(number, "jpg") for number in range(len(samples))]

    def whole_files() -> None:
        for file in found.files:
            file.read_bytes()

    def by_pillow() -> None:
        for data in stored:
            Image.open(io.BytesIO(data), formats=["JPEG"]).load()

    def by_simplejpeg() -> None:
        for data in stored:
            simplejpeg.decode_jpeg(data, "RGB", strict=True)

    def checksums() -> None:
        for data in stored:
            zlib.crc32(data)

    paths = [drain(partial(ours, found)), drain(partial(theirs, found))]
    steps = [whole_files, checksums, by_pillow, by_simplejpeg, *paths]
    read, verified, decoded, turbo, mine, other = per_sample(name, root, rounds, steps)
    return [
        Row.of(f"{name}, limit: whole files", "CPU ms a sample", read, mine, "our whole path"),
        Row.of(f"{name}, limit: crc32 of the pictures", "CPU ms a sample", verified, mine, "our whole path"),
        Row.of(f"{name}, limit: Pillow decodes", "CPU ms a sample", decoded, mine, "our whole path"),
        Row.of(f"{name}, limit: simplejpeg decodes", "CPU ms a sample", turbo, mine, "our whole path"),
        Row.of(f"{name}, limit: Pillow decodes", "CPU ms a sample", decoded, other, "their whole path"),
        Row.of(f"{name}, limit: simplejpeg decodes", "CPU ms a sample", turbo, other, "their whole path"),
    ]


def resume_rows(root: Path, rounds: int) -> list[Row]:
    """From nothing to the first batch in the middle of an epoch of a million samples."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        plan = Plan([Contents.uniform([10_000] * 100)], 4096, 0, True)
        next(plan.batches(3, plan.num_batches // 2))
        seconds.append(time.perf_counter() - start)
    return [Row.of("resume in the middle of 1 M samples", "s", sorted(seconds)[rounds // 2], 1.0, "bound", 1.0, 0.1)]


def billion_rows(root: Path, rounds: int) -> list[Row]:
    """A plan of a billion samples: time, memory; and the size of an index of them, on paper."""
    start = time.perf_counter()
    plan = Plan([Contents.uniform([10_000] * 100_000)], 32_768, 0, True)
    batches = plan.batches(5, plan.num_batches // 2)
    next(batches)
    first = time.perf_counter() - start
    start = time.perf_counter()
    windows = 3 * 64 * 10_000 // 32_768  # batches of three windows
    for _ in range(windows):
        next(batches)
    each = (time.perf_counter() - start) / windows
    tracemalloc.start()
    again = Plan([Contents.uniform([10_000] * 100_000)], 32_768, 0, True)
    for _ in zip(again.batches(5, again.num_batches // 2), range(windows), strict=False):
        pass
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    key, extensions = 9, 3
    size = (extensions * MEMBER.itemsize + 1 + 8 + key) * 1e9 / 2**30
    return [
        Row.of("1e9 samples: plan, and a batch in the middle", "s", first, 1.0, "bound", 1.0),
        Row.of("1e9 samples: a planned batch of 32,768", "s", each, 0.1, "bound", 1.0),
        Row.of("1e9 samples: memory of the plan", "MiB", peak, 500.0, "bound", 1.0),
        Row.of("1e9 samples: index of jpg, txt, json, on paper", "GiB", size, 12_800.0 * 1e9 / 2**30, "their pictures"),
    ]


CASES: dict[str, Callable[[Path, int], list[Row]]] = {
    f"{SMALL} parity": partial(pipeline_rows, SMALL, "torch", 2.0, 2.6),
    f"{LARGE} parity": partial(pipeline_rows, LARGE, "torch", 1.4, 2.0),
    f"{SMALL} opencv": partial(pipeline_rows, SMALL, "opencv", 3.5, 4.5),
    "reading": reading_rows,
    f"crops {SMALL}": partial(crop_rows, SMALL),
    f"crops {LARGE}": partial(crop_rows, LARGE),
    f"limits {SMALL}": partial(limit_rows, SMALL),
    f"limits {LARGE}": partial(limit_rows, LARGE),
    "resume": resume_rows,
    "billion": billion_rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = comparison_parser(__doc__, RESULT, rounds=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    packages = ("torch", "torchvision", "open_clip_torch", "webdataset", "pillow", "simplejpeg", "numpy", "mmrep")
    with tempfile.TemporaryDirectory() as root:
        measurements = {name: partial(run, Path(root), options.rounds) for name, run in CASES.items()}
        compare("The data layer", measurements, parser, options, RESULT, packages)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
