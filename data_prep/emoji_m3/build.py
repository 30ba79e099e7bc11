"""From settings to a folder of shards and its index.

A shard is a pure function of (settings, task, split, shard number), made in a fresh process: the number of workers, the
order of the shards and a build that was stopped half-way change no byte.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.emoji_m3.catalog import Catalog, load_catalog
from data_prep.emoji_m3.forked import run_forked
from data_prep.emoji_m3.plan import Sample, plan_shard
from data_prep.emoji_m3.render import Pictures, render_all
from data_prep.emoji_m3.settings import SPLITS, Settings
from data_prep.emoji_m3.sources import TARBALLS, fetch_all, python_versions
from data_prep.emoji_m3.speech import Speaker, encode_flac, resample
from mmrep.errors import DataError
from mmrep.progress import track

FORMAT = 1  # raise it when a change of this code changes the bytes of a build
STAMP, INDEX = "build.json", "index.json"
UNICODE_LICENCE = {"title": "Unicode License v3", "spdx": "Unicode-3.0", "author": "Unicode, Inc."}
ESPEAK_LICENCE = {
    "title": "GNU General Public License v3 or later",
    "spdx": "GPL-3.0-or-later",
    "author": "the eSpeak NG authors",
    "note": "the licence of the program that speaks, used as a tool; nothing of it is in the shards",
}


@dataclass(frozen=True)
class Shard:
    """One shard to make."""

    folder: Path
    task: str
    split: str
    number: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self}.tar"

    def __str__(self) -> str:
        return f"{self.split}-{self.number:06d}"


def build(
    settings: Settings, out: Path, *, tasks: Sequence[str], workers: int, cache: Path, overwrite: bool = False
) -> list[str]:
    """Builds the tasks that ``out`` does not hold yet and returns their names; what a stopped build finished is kept.

    Raises:
        DataError: A package is missing or broken, or ``out`` holds another build and ``overwrite`` is off.
    """
    stamps = {task: make_stamp(settings, task) for task in tasks}
    missing = [task for task in tasks if overwrite or not is_complete(settings, out, task)]
    if not missing:
        return []
    catalog = load_catalog(settings, fetch_all(cache))
    pictures = dict(track(render_all(catalog), sum(len(emoji.vendors) for emoji in catalog.emoji), "pictures"))
    for task in missing:
        prepare(out / task, stamps[task], overwrite)
    shards = [shard for task in missing for shard in shards_of(settings, out, task)]
    make_shards(settings, catalog, pictures, shards, workers)
    for task in missing:
        write_index(out / task, catalog, stamps[task])
    return missing


def make_stamp(settings: Settings, task: str) -> dict[str, Any]:
    """All that the bytes of a build follow from."""
    npm = {tarball.package: {"version": tarball.version, "sha256": tarball.sha256} for tarball in TARBALLS.values()}
    pypi = {package: {"version": version} for package, version in python_versions().items()}
    facts = {"dataset": "emoji-m3", "format": FORMAT, "task": task, "settings": asdict(settings)}
    return facts | {"packages": npm | pypi}


def stamp_text(stamp: dict[str, Any]) -> str:
    """The stamp as its file holds it."""
    return json.dumps(stamp, indent=1, sort_keys=True) + "\n"


def is_complete(settings: Settings, out: Path, task: str) -> bool:
    """Whether ``out`` holds this task whole, with its index; raises DataError when it holds anything else."""
    folder = out / task
    if not folder.exists() or not any(folder.iterdir()):
        return False
    stamp = folder / STAMP
    if not stamp.exists() or stamp.read_text("utf-8", errors="replace") != stamp_text(make_stamp(settings, task)):
        fix = "choose another --out, or pass --overwrite"
        raise DataError("the folder holds something else", where=folder, fix=fix)
    return (folder / INDEX).exists() and not shards_of(settings, out, task)


def prepare(folder: Path, stamp: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder and stamps it; on ``overwrite`` removes the files of an earlier build, and no others.

    Raises:
        DataError: It holds something, but neither an index nor the stamp of a build.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite and any(folder.iterdir()):
        if not (folder / INDEX).exists() and not (folder / STAMP).exists():
            raise DataError("the folder holds something else", where=folder, fix="choose another --out")
        shards = [path for split in SPLITS for path in folder.glob(f"{split}-{'[0-9]' * 6}.tar")]
        for path in [*shards, folder / INDEX, folder / STAMP]:
            path.unlink(missing_ok=True)
    beside = folder / f"{STAMP}.tmp"
    beside.write_text(stamp_text(stamp), "utf-8")
    beside.replace(folder / STAMP)


def shards_of(settings: Settings, out: Path, task: str) -> list[Shard]:
    """The shards of a task that are not there yet."""
    sizes = {split: settings.shard_sizes(task, split) for split in SPLITS}
    shards = [Shard(out / task, task, split, number) for split in SPLITS for number in range(len(sizes[split]))]
    return [shard for shard in shards if not shard.path.exists()]


def make_shards(
    settings: Settings, catalog: Catalog, pictures: Pictures, shards: Sequence[Shard], workers: int
) -> None:
    """Makes each shard in a process of its own, which inherits the catalog and the pictures."""
    for module in ("scipy.signal", "soundfile", "webdataset", "mmrep.data.writer"):
        importlib.import_module(module)  # slow to import: the processes inherit them

    done = run_forked(partial(make_shard, settings, catalog, pictures), shards, workers)
    for _ in track(done, len(shards), "shards"):
        pass


def make_shard(settings: Settings, catalog: Catalog, pictures: Pictures, shard: Shard) -> None:
    """Draws, speaks and writes one shard; call it in a fresh process (see Speaker)."""
    from mmrep.data.writer import write_shard

    samples = plan_shard(settings, catalog.emoji, shard.task, shard.split, shard.number)
    seed = hashlib.sha256(f"{settings.seed}/{shard.task}/{shard}".encode()).digest()
    clips = speak(samples, Speaker(int.from_bytes(seed[:3])))
    write_shard(shard.path, members(shard, samples, clips, catalog, pictures))


def speak(samples: Sequence[Sample], speaker: Speaker) -> list[bytes]:
    """FLAC of each sample; spoken in the order of language and voice, since a change of voice is slow."""
    clips = [b""] * len(samples)
    for i in sorted(range(len(samples)), key=lambda i: (samples[i].audio_lang, samples[i].voice, i)):
        one = samples[i]
        pcm = speaker.say(one.spoken, one.audio_lang, one.voice, one.rate, one.pitch)
        if not pcm.any():
            raise DataError(f"espeak-ng is silent for {one.spoken!r} in {one.audio_lang}")
        clips[i] = encode_flac(resample(pcm))
    return clips


def members(
    shard: Shard, samples: Sequence[Sample], clips: Sequence[bytes], catalog: Catalog, pictures: Pictures
) -> Iterator[dict[str, Any]]:
    """The samples as WebDataset members."""
    labels = {emoji.code: label for label, emoji in enumerate(catalog.emoji)}
    for i, (sample, clip) in enumerate(zip(samples, clips, strict=True)):
        yield {
            "__key__": f"{shard}-{i:06d}",
            "png": pictures[sample.emoji.code, sample.vendor],
            "txt": sample.text,
            "flac": clip,
            "json": describe(sample, labels[sample.emoji.code]),
        }


def describe(sample: Sample, label: int) -> dict[str, Any]:
    """The facts of a sample; ``label`` is the class of its picture."""
    emoji = sample.emoji
    facts = {"emoji": emoji.char, "hex": emoji.code, "label": label, "group": emoji.group, "subgroup": emoji.subgroup}
    audio = {"audio_lang": sample.audio_lang, "spoken": sample.spoken, "voice": sample.voice}
    text = {"text_lang": sample.text_lang, "words": [list(pair) for pair in sample.words]}
    return facts | text | audio | {"vendor": sample.vendor, "rate": sample.rate, "pitch": sample.pitch}


def write_index(folder: Path, catalog: Catalog, stamp: dict[str, Any]) -> None:
    """Indexes a folder whose shards are all there; this marks the build as complete."""
    from mmrep.data.build import build_index
    from mmrep.data.index import Label, Modality

    modalities = {
        "image": Modality(extensions=("png",), kind="image"),
        "text": Modality(extensions=("txt",), kind="text"),
        "audio": Modality(extensions=("flac",), kind="audio"),
    }
    labels = {
        "label": Label(classes=[emoji.names["en"] for emoji in catalog.emoji], templates=["{c}"]),
        "group": Label(classes=_unique(emoji.group for emoji in catalog.emoji), templates=["{c}"]),
    }
    licences = catalog.licences | {"names": UNICODE_LICENCE, "emoji-data": UNICODE_LICENCE, "espeak-ng": ESPEAK_LICENCE}
    build_index(folder, modalities, group_key="label", labels=labels, provenance=stamp, licences=licences).save()


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
