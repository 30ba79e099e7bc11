"""Small releases in the real layouts of the field's data sets; what is in them can be computed from the numbers here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from tests.tiny import COLOURS, flac

TRANSLATIONS = {"tench": 0, "goldfish": 1, "dome": 2}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
DIMENSIONS = ["sentiment", "happy", "sad", "anger", "surprise", "disgust", "fear"]


def jpeg(number: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[number % len(COLOURS)]).save(buffer, "JPEG")
    return buffer.getvalue()


def wav(number: int, seconds: float = 0.2) -> bytes:
    """A tone, 16 bit at 16 kHz."""
    samples, rate = soundfile.read(io.BytesIO(flac(250.0 * 1.5 ** (number % 6), seconds)))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    """Write a file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def put_csv(path: Path, rows: Sequence[Sequence[Any]], encoding: str = "utf-8") -> Path:
    """Write a CSV file, the header first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def write_coco(root: Path, sizes: dict[str, int] | None = None) -> Path:
    """The release of 2017: picture ``n`` has id ``100 + n`` and 5 captions, every third 6."""
    first = 0
    for split, size in (sizes or {"train": 6, "val": 4}).items():
        images, annotations = [], []
        for number in range(first, first + size):
            name, image = f"{number:012d}.jpg", 100 + number
            put(root / f"{split}2017" / name, jpeg(number))
            images.append({"license": 4, "file_name": name, "height": 16, "width": 20, "id": image, "coco_url": "-"})
            count = 6 if number % 3 == 2 else 5
            annotations += [
                {"image_id": image, "id": 1000 * image + place, "caption": f"A picture {number}, told {place}.\n"}
                for place in range(count)
            ]
        content = {"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations[::-1]}
        put(root / "annotations" / f"captions_{split}2017.json", json.dumps(content))
        first += size
    return root


def write_karpathy(root: Path, *, flickr: bool = False) -> Path:
    """Karpathy's file; gives its path. COCO's has all four splits, pictures 0 to 5; picture 3 lies by its name of 2017."""
    images = []
    for number, split in enumerate(["train", "restval", "val", "test", "test", "train"]):
        name = f"{number}.jpg" if flickr else f"COCO_val2014_{number:012d}.jpg"
        texts = [f"picture {number}, told {place}" for place in range(5)]
        image = {"filename": name, "imgid": number, "split": split, "sentids": list(range(5))}
        image["sentences"] = [{"tokens": text.split(), "raw": text, "imgid": number, "sentid": 0} for text in texts]
        place = root / "flickr30k-images" / name
        if not flickr:
            image |= {"filepath": "val2014", "cocoid": 500 + number}
            place = root / "val2014" / name if number != 3 else root / "train2017" / f"{503:012d}.jpg"
        put(place, jpeg(number))
        images.append(image)
    name = "flickr30k" if flickr else "coco"
    return put(root / f"dataset_{name}.json", json.dumps({"images": images, "dataset": name}))


def write_clotho(root: Path, size: int = 4) -> Path:
    """Three splits; the metadata of development is Latin-1, as in the release."""
    for start, split in enumerate(("development", "validation", "evaluation")):
        rows = [["file_name", *(f"caption_{place}" for place in range(1, 6))]]
        metadata = [["file_name", "keywords", "sound_id", "sound_link", "start_end_samples", "manufacturer", "license"]]
        for number in range(size):
            name = f"Clip {start}{number}, a door.wav"
            put(root / split / name, wav(size * start + number))
            rows.append([name, *(f"{split} clip {number}, told {place}" for place in range(5))])
            metadata.append([name, "door;wood", "1", "https://freesound.org/1", "[0, 9]", "José", "CC BY 3.0"])
        put_csv(root / f"clotho_captions_{split}.csv", rows)
        if split == "development":
            put_csv(root / f"clotho_metadata_{split}.csv", metadata, "latin-1")
    return root


def write_audiocaps(root: Path, audio: Path, pattern: str = "{youtube_id}_{start_time}") -> Path:
    """4 clips to train on with a caption each, 2 to validate and 3 to test with five each."""
    identifier = 10
    for split, clips, captions in (("train", 4, 1), ("val", 2, 5), ("test", 3, 5)):
        rows: list[list[Any]] = [["audiocap_id", "youtube_id", "start_time", "caption"]]
        for number in range(clips):
            fields = {"youtube_id": f"-{split}_{number}", "start_time": 30 * number, "audiocap_id": identifier}
            put(audio / split / f"{pattern.format(**fields)}.wav", wav(identifier))
            for place in range(captions):
                told = f"{split} clip {number}, told {place}"
                rows.append([identifier, fields["youtube_id"], fields["start_time"], told])
                identifier += 1
        put_csv(root / f"{split}.csv", rows)
    return root


def write_symile_m3(root: Path, sizes: dict[str, int] | None = None, group: int = 3) -> Path:
    """A configuration of two languages in Parquet, two files of training; classes go round."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema(
        {"lang": pa.string(), "audio": stored, "image": stored, "text": pa.string(), "cls": pa.string()}
        | {"cls_id": pa.int64(), "target_text": pa.string()}
    )
    words = list(TRANSLATIONS)
    root.mkdir(parents=True, exist_ok=True)
    for split, size in (sizes or {"train": 10, "val": 6, "test": 6}).items():
        rows = [
            {
                "lang": ("en", "el")[number % 2],
                "audio": {"bytes": flac(300.0 + number), "path": f"common_voice_{number}.mp3"},
                "image": {"bytes": jpeg(number), "path": f"n01440764_{number}.JPEG"},
                "text": f"{words[number % 3]}_λέξη {number}",
                "cls": words[number % 3],
                "cls_id": number % 3,
                "target_text": words[number % 3],
            }
            for number in range(size)
        ]
        half = size // 2 if split == "train" else size
        for place, part in enumerate(filter(None, (rows[:half], rows[half:]))):
            name = f"{split}-{place:05d}-of-{2 if split == 'train' else 1:05d}.parquet"
            pq.write_table(pa.Table.from_pylist(part, schema), root / name, row_group_size=group)
    entries = {name: {"synset_id": "n0", "cls_id": number, "en": name} for name, number in TRANSLATIONS.items()}
    put(root.parent / "translations.json", json.dumps(entries))
    return root


def xray(number: int, side: int = 32) -> np.ndarray:
    """The pixels of an admission's X-ray, grey, uint8 ``[side, side]``."""
    return np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)


def write_symile_mimic(root: Path, sizes: dict[str, int] | None = None, candidates: int = 10) -> Path:
    """Arrays and tables of the release; X-rays of 32 pixels a side, electrocardiograms of 64 steps.

    Admission ``n`` has the id ``20000 + n``, an electrocardiogram of ``n / 1000`` plus the lead, and laboratory value ``j``
    only where ``n + j`` is even.
    """
    first = 0
    for split, size in (sizes or {"train": 8, "val": 10, "test": 12}).items():
        own = list(range(first, first + size))
        repeated = [(n, n, 1) for n in own]
        for n in own:
            repeated += [(m, n, 0) for m in own[(n - first + 1) :] + own[: n - first]][: candidates - 1]
        _put_arrays(root, split, repeated if split == "test" else [(n, n, 1) for n in own])
        if split == "val":
            _put_arrays(root, "val_retrieval", repeated)
        header = ["subject_id", "hadm_id", "Edema", "Lung Opacity"]
        table = [header] + [[n, float(20000 + n), ["1.0", "0.0", "-1.0", ""][n % 4], ""] for n in own]
        put_csv(root / f"{split}.csv", table)
        first += size
    return root


def _put_arrays(root: Path, split: str, rows: Sequence[tuple[int, int, int]]) -> None:
    folder = root / "data_npy" / split
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [shown for shown, _, _ in rows]
    pixels = np.stack([xray(n) for n in numbers]) / 255
    cxr = (pixels[:, None] - MEAN.reshape(1, 3, 1, 1)) / STD.reshape(1, 3, 1, 1)
    leads = np.arange(12, dtype=np.float32)
    ecg = np.stack([np.broadcast_to(n / 1000 + leads, (1, 64, 12)) for n in numbers])
    known = np.stack([[(n + j) % 2 == 0 for j in range(50)] for n in numbers]).astype(np.int64)
    arrays = {
        "cxr": cxr.astype(np.float32),
        "ecg": ecg.astype(np.float32),
        "labs_percentiles": np.full((len(numbers), 50), 0.25, dtype=np.float32),
        "labs_missingness": known,
        "hadm_id": np.array([20000 + n for n in numbers]),
    }
    if split in ("val_retrieval", "test"):
        arrays |= {"label_hadm_id": np.array([20000 + asked for _, asked, _ in rows])}
        arrays |= {"label": np.array([right for _, _, right in rows])}
    for name, array in arrays.items():
        np.save(folder / f"{name}_{split}.npy", array)


def put_csd(path: Path, name: str, videos: dict[str, tuple[Any, Any]]) -> Path:
    """A computational sequence of the SDK: ``NAME/data/VIDEO/{features,intervals}`` and ``NAME/metadata``."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        root = file.create_group(name)
        data = root.create_group("data")
        for video, (features, intervals) in videos.items():
            group = data.create_group(video)
            group.create_dataset("features", data=features, compression="gzip")
            group.create_dataset("intervals", data=np.asarray(intervals, dtype=np.float64), compression="gzip")
        text = root.create_group("metadata").create_dataset("root name", (1,), dtype=h5py.special_dtype(vlen=str))
        text[0] = json.dumps(name)
    return path


def write_cmu_mosei(root: Path, videos: int = 8, segments: int = 2) -> Path:
    """Segments of two seconds with three words and a pause; COVAREP at 10 frames a second, a video in five without FACET.

    Segment ``s`` of video ``v`` has sentiment ``(v - 3) / 2`` and happiness where ``s`` is odd. COVAREP's channel ``c`` at
    frame ``f`` is ``f + c``, channel 1 infinite.
    """
    names = [f"video_{number}" for number in range(videos)]
    length = 2 * segments
    words, glove, labels, covarep, facet = {}, {}, {}, {}, {}
    for number, video in enumerate(names):
        spans = [[2 * s + 0.5 * w, 2 * s + 0.5 * w + 0.5] for s in range(segments) for w in range(4)]
        spoken = [b"sp" if w == 1 else f"word{number}{w}".encode() for s in range(segments) for w in range(4)]
        words[video] = (np.array(spoken, dtype="S16")[:, None], spans)
        glove[video] = (np.full((len(spans), 300), number, dtype=np.float32), spans)
        scores = [[(number - 3) / 2, s % 2, 0, 0, 0, 0, 0] for s in range(segments)]
        labels[video] = (np.array(scores, dtype=np.float32), [[2 * s, 2 * s + 2] for s in range(segments)])
        frames = np.arange(10 * length, dtype=np.float32)[:, None] + np.arange(74, dtype=np.float32)
        frames[:, 1] = -np.inf
        times = [[frame / 10, frame / 10 + 0.1] for frame in range(10 * length)]
        covarep[video] = (frames, times)
        if number % 5 != 4:
            facet[video] = (np.full((10 * length, 35), number, dtype=np.float32), times)
    put_csd(root / "language" / "CMU_MOSEI_TimestampedWords.csd", "words", words)
    put_csd(root / "language" / "CMU_MOSEI_TimestampedWordVectors.csd", "glove_vectors", glove)
    put_csd(root / "acoustic" / "CMU_MOSEI_COVAREP.csd", "COVAREP", covarep)
    put_csd(root / "visual" / "CMU_MOSEI_VisualFacet42.csd", "FACET 4.2", facet)
    put_csd(root / "labels" / "CMU_MOSEI_Labels.csd", "All Labels", labels)
    folds = {"train": names[: videos - 4], "valid": names[-4:-2], "test": [*names[-2:], "video_without_labels"]}
    text = "\n\n".join(f"standard_{name}_fold={videos_of}" for name, videos_of in folds.items())
    put(root / "cmu_mosei_std_folds.py", text + "\n")
    return root
