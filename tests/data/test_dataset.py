"""From shards to batches: presence, labels, and random numbers that depend on the sample alone."""

from __future__ import annotations

import io
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrep.batch import Batch
from mmrep.data.build import build_index, label_classes, sorted_classes
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Index, Label, Modality
from mmrep.data.plan import Plan
from mmrep.data.reader import Samples
from mmrep.data.writer import write_shard
from mmrep.encoders import ConvImageEncoder, Encoder, FeaturesEncoder, MelAudioEncoder, NgramTextEncoder, SeriesEncoder
from mmrep.errors import ConfigError, DataError
from mmrep.stable_hash import stable_hash
from tests.tiny import flac, png


@pytest.fixture
def encoders() -> dict[str, Encoder]:
    return {
        "image": ConvImageEncoder(8, image_size=16, width=8),
        "text": NgramTextEncoder(8, buckets=64, length=32),
        "audio": MelAudioEncoder(8, seconds=0.2, width=8),
    }


def batches(shards: Path, encoders: dict[str, Encoder], split: str, *, train: bool, workers: int = 0) -> list[Batch]:
    dataset = ShardDataset(Samples(Index.load(shards), split), encoders, global_batch_size=8, train=train)
    return list(make_loader(dataset, encoders, num_workers=workers))


def test_batches_have_shape_type_and_presence(tiny_shards: Path, encoders: dict[str, Encoder]) -> None:
    found = batches(tiny_shards, encoders, "test", train=False)
    assert [len(batch) for batch in found] == [8, 8, 8]
    keys = [key for batch in found for key in batch.keys]
    assert [key for key in keys if key] == [f"test-0-{i:04d}" for i in range(13)] + [
        f"test-1-{i:04d}" for i in range(7)
    ]
    for batch in found:
        assert batch.inputs["image"].shape == (8, 3, 16, 16) and batch.inputs["image"].dtype == torch.uint8
        assert batch.inputs["audio"].dtype == torch.int16 and batch.inputs["text"].dtype == torch.int32
        for name, present in batch.present.items():
            absent = batch.inputs[name][~present]
            assert float(absent.float().abs().sum()) == 0
            assert torch.equal(present, batch.labels[f"@content:{name}"] >= 0)
    numbers = range(68, 88)
    present = torch.cat([batch.present["image"] for batch in found])[:20]
    assert present.tolist() == [number % 7 != 3 for number in numbers]
    labels = torch.cat([batch.labels["label"] for batch in found])
    assert labels.tolist() == [number % 6 for number in numbers] + [-1] * 4
    groups = torch.cat([batch.labels["@group"] for batch in found])[:20]
    assert len(set(groups.tolist())) == 6 and groups[0] == groups[6]


def test_classes_by_name_and_by_number(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    """A number that is the name of a class is a name: 10 is the second class here, not the eleventh."""
    values: list[object] = [1, 2, 10, "2", 99, None]
    samples = [{"__key__": f"k{i}", "txt": "x", "json": {"digit": value}} for i, value in enumerate(values)]
    write_shard(tmp_path / "test-0.tar", [*samples, {"__key__": "list", "txt": "x", "json": [1]}])
    text = Modality(("txt",), "text")
    assert label_classes(build_index(tmp_path, {"text": text}), "digit") == ["1", "2", "10", "99"]
    build_index(tmp_path, {"text": text}, labels={"digit": Label(["1", "10", "2"])}).save()
    dataset = ShardDataset(Samples(Index.load(tmp_path), "test"), {"text": encoders["text"]})
    assert [dataset[i].labels["digit"] for i in range(len(values))] == [0, 2, 1, 2, -1, -1]
    with pytest.raises(DataError, match=r"no object .*test-0\.tar:list"):
        dataset[len(values)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["10", "2", "0", "1"], ["0", "1", "2", "10"]),
        (["1", "-2", "01"], ["-2", "01", "1"]),
        (["10", "2", "x"], ["10", "2", "x"]),
        (["1" * 5000, "2"], ["1" * 5000, "2"]),
        (["2", "\u00b2", "10"], ["10", "2", "\u00b2"]),
    ],
)
def test_classes_that_are_whole_numbers_are_in_their_order(names: list[str], expected: list[str]) -> None:
    assert sorted_classes(names) == expected


def test_half_a_character_is_a_group_like_any_other(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    values = [b'{"id": "\\ud83d"}', b'{"id": "\\ud83e"}', b'{"id": "\\ud83d"}']
    samples = [{"__key__": f"k{i}", "txt": "x", "json": value} for i, value in enumerate(values)]
    write_shard(tmp_path / "train-0.tar", samples)
    build_index(tmp_path, {"text": Modality(("txt",), "text")}, group_key="id").save()
    dataset = ShardDataset(Samples(Index.load(tmp_path), "train"), {"text": encoders["text"]}, train=True)
    groups = [dataset[i].labels["@group"] for i in range(3)]
    assert groups[0] == groups[2] != groups[1]


def test_the_hash_never_changes() -> None:
    """Groups, augmentations and the order of a run that goes on depend on it."""
    assert stable_hash("0 0 0 0") == stable_hash(b"0 0 0 0") == 3434107503531660146
    assert stable_hash("é 😀") == 1973962309391414968


def test_two_classes_of_one_name(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    """A label by number reaches all of them; by the name of several it would be a guess."""
    values: list[object] = [0, 3, 4, "cat", "crane"]
    samples = [{"__key__": f"k{i}", "txt": "x", "json": {"kind": value}} for i, value in enumerate(values)]
    write_shard(tmp_path / "test-0.tar", samples)
    text, label = Modality(("txt",), "text"), Label(["crane", "cat", "crane", "dog"])
    build_index(tmp_path, {"text": text}, labels={"kind": label}).save()
    dataset = ShardDataset(Samples(Index.load(tmp_path), "test"), {"text": encoders["text"]})
    assert [dataset[i].labels["kind"] for i in range(4)] == [0, 3, -1, 1]
    with pytest.raises(DataError, match=r"'kind' is 'crane', the name of several classes .*test-0\.tar:k4"):
        dataset[4]


def test_an_empty_shard_has_no_batch_and_says_so(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    from mmrep.errors import MmrepError
    from mmrep.evaluation.embeddings import embed_loader
    from mmrep.losses import PairwiseCLIPLoss
    from mmrep.model import MultimodalModel

    write_shard(tmp_path / "test-0.tar", [])
    write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "txt": "x"}])
    build_index(tmp_path, {"text": Modality(("txt",), "text")}).save()
    model = MultimodalModel({"text": encoders["text"]}, PairwiseCLIPLoss())
    dataset = ShardDataset(Samples(Index.load(tmp_path), "test"), model.by_modality, global_batch_size=4)
    with pytest.raises(MmrepError, match="nothing to evaluate"):
        embed_loader(model, make_loader(dataset, model.by_modality))


def test_workers_change_nothing(tiny_shards: Path, encoders: dict[str, Encoder]) -> None:
    """The augmentation of a sample comes from (seed, epoch, sample), not from the worker or what was loaded before."""
    alone, shared = (batches(tiny_shards, encoders, "train", train=True, workers=workers) for workers in (0, 2))
    for one, other in zip(alone, shared, strict=True):
        assert one.keys == other.keys
        assert all(torch.equal(one.inputs[name], other.inputs[name]) for name in encoders)


def test_training_is_augmented_and_evaluation_is_not(tiny_shards: Path, encoders: dict[str, Encoder]) -> None:
    samples = Samples(Index.load(tiny_shards), "train")
    train = ShardDataset(samples, encoders, train=True)
    assert not torch.equal(train.load(0, 0, 0).values["audio"], train.load(0, 1, 0).values["audio"])
    assert torch.equal(train.load(0, 1, 0).values["audio"], train.load(0, 1, 0).values["audio"])
    plain = ShardDataset(samples, encoders)
    assert torch.equal(plain.load(0, 0, 0).values["audio"], plain.load(0, 1, 0).values["audio"])


def test_loading_leaves_the_random_state_of_the_process_alone(tiny_shards: Path, encoders: dict[str, Encoder]) -> None:
    before = torch.get_rng_state()
    ShardDataset(Samples(Index.load(tiny_shards), "train"), encoders, train=True)[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_modalities_that_do_not_fit_are_refused(tiny_shards: Path, encoders: dict[str, Encoder]) -> None:
    samples = Samples(Index.load(tiny_shards), "test")
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        ShardDataset(samples, {"imgae": encoders["image"]})
    with pytest.raises(ConfigError, match="modality 'audio' is audio, its encoder FeaturesEncoder takes array"):
        ShardDataset(samples, {"audio": FeaturesEncoder(8)})


def test_datasets_with_other_modalities_are_blended(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    """One has pictures and texts, the other texts and sounds, and each its own classes of one name."""
    images, sounds = tmp_path / "images", tmp_path / "sounds"
    for folder, extension, make in (
        (images, "png", lambda i: png((9, i, 9))),
        (sounds, "flac", lambda i: flac(300 + i)),
    ):
        folder.mkdir()
        samples = [
            {
                "__key__": f"{folder.name}{i}",
                extension: make(i),
                "txt": f"t {i}",
                "json": {"kind": i % 2, "group": i % 3},
            }
            for i in range(12)
        ]
        write_shard(folder / "train-0.tar", samples)
    text = Modality(("txt",), "text")
    build_index(
        images,
        {"image": Modality(("png",), "image"), "text": text},
        group_key="group",
        labels={"kind": Label(["0", "1"])},
    ).save()
    build_index(
        sounds,
        {"audio": Modality(("flac",), "audio"), "text": text},
        group_key="group",
        labels={"kind": Label(["1", "0"])},
    ).save()
    parts = [Samples(Index.load(folder), "train") for folder in (images, sounds)]
    plan = Plan([part.contents(list(encoders)) for part in parts], 6, 0, True, [2, 1], "stratified")
    dataset = ShardDataset(parts, encoders, plan=plan, train=True)
    groups: dict[str, set[int]] = {"images": set(), "sounds": set()}
    for batch in make_loader(dataset, encoders):
        here = [key.startswith("images") for key in batch.keys]
        assert sum(here) == 4 and batch.present["image"].tolist() == here
        assert batch.present["audio"].tolist() == [not image for image in here] and bool(batch.present["text"].all())
        assert not batch.inputs["image"][~batch.present["image"]].any()  # type: ignore[index]  # a tensor, no list
        assert "kind" not in batch.labels  # they do not agree on what 0 is
        for key, group in zip(batch.keys, batch.labels["@group"].tolist(), strict=True):
            groups[key[:6]].add(group)
    assert len(groups["images"]) == len(groups["sounds"]) == 3 and not groups["images"] & groups["sounds"]
    with pytest.raises(ConfigError, match="did you mean 'audio'"):
        ShardDataset(parts, {**encoders, "adio": encoders["audio"]})


def test_a_broken_sample_names_its_shard_and_key(tmp_path: Path, encoders: dict[str, Encoder]) -> None:
    write_shard(tmp_path / "train-0.tar", [{"__key__": "k1", "png": b"no picture"}])
    build_index(tmp_path, {"image": Modality(("png",), "image")}).save()
    dataset = ShardDataset(Samples(Index.load(tmp_path), "train"), {"image": encoders["image"]})
    with pytest.raises(DataError, match=r"train-0\.tar:k1"):
        dataset[0]


def series_shards(folder: Path) -> Samples:
    """Of four series of 12 channels; one of 11."""
    samples = []
    for number in range(4):
        np.save(buffer := io.BytesIO(), np.zeros((12 - (number == 3), 40), "f4"))
        samples.append({"__key__": f"s{number}", "npy": buffer.getvalue()})
    write_shard(folder / "train-0.tar", samples)
    build_index(folder, {"ecg": Modality(("npy",), "array")}).save()
    return Samples(Index.load(folder), "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_array_of_another_shape_names_the_sample(tmp_path: Path, workers: int) -> None:
    """Also from a worker, which hands over no notes."""
    encoders: dict[str, Encoder] = {"ecg": SeriesEncoder(8, length=40)}
    dataset = ShardDataset(series_shards(tmp_path), encoders, global_batch_size=4, train=True, replace=True)
    with pytest.raises(DataError, match=r"\[11, 40\] where \[12, time\] .* \[train-0\.tar:s3\]; set ch") as caught:
        list(make_loader(dataset, encoders, num_workers=workers))
    assert str(caught.value.where) == "train-0.tar:s3"


def divides_by_zero(*_: object) -> torch.Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize(("bug", "workers"), [("transform", 1), ("decoder", 0)])
def test_a_bug_names_the_sample(tmp_path: Path, bug: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders: dict[str, Encoder] = {"ecg": SeriesEncoder(8, length=40)}
    dataset = ShardDataset(series_shards(tmp_path), encoders, global_batch_size=4, train=True, replace=True)
    if bug == "transform":
        dataset.transforms["ecg"] = divides_by_zero
    else:
        monkeypatch.setattr("mmrep.data.dataset.decode", divides_by_zero)
    with pytest.raises(ZeroDivisionError) as caught:
        list(make_loader(dataset, encoders, num_workers=workers))
    assert "while preparing 'ecg' of train-0.tar:s" in "".join(traceback.format_exception(caught.value))
