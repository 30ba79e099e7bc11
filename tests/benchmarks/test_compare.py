"""`make compare`: who lacks what, what is measured again, the table and the picture; and the committed figures."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.compare import __main__ as compare
from benchmarks.compare import results, settings, table
from benchmarks.compare.cache import load_split
from benchmarks.compare.encoders import CachedMelEncoder
from benchmarks.compare.missing import is_present, presence
from benchmarks.compare.plot import plot, spread_out
from benchmarks.compare.settings import BY_NAME, MISSING, MODALITIES, SEEDS, TASKS, Cell, Settings, cells, digest
from benchmarks.compare.train import test as evaluate
from benchmarks.compare.train import train
from mmrep.data.build import build_index
from mmrep.data.index import Label
from mmrep.data.writer import write_shard
from mmrep.encoders import MelAudioEncoder
from mmrep.errors import DataError
from tests import tiny

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "compare.json"
KEYS = [f"sample-{number:05d}" for number in range(5_000)]
SMALL = Settings(
    image_size=16,
    image_width=8,
    text_buckets=256,
    text_length=24,
    seconds=0.2,
    audio_width=8,
    embed_dim=16,
    draws={"joint": 2, "plain": 2},
    epochs={"joint": 1, "plain": 1},
    batch_size=16,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks as small shards of complete samples: a class is a colour, a word and a tone."""
    folder = tmp_path_factory.mktemp("compare")
    for task in TASKS:
        for split, size in (("train", 48), ("test_both", 18)):
            samples = [_sample(f"{split}-{number:03d}", number) for number in range(size)]
            (folder / task).mkdir(exist_ok=True)
            write_shard(folder / task / f"{split}-000000.tar", samples)
        build_index(folder / task, tiny.MODALITIES, group_key="label", labels={"label": Label(tiny.CLASSES)}).save()
    return folder


def _sample(key: str, number: int) -> dict[str, Any]:
    label = number % len(tiny.CLASSES)
    return {
        "__key__": key,
        "png": tiny.png(tiny.COLOURS[label], noise=number),
        "txt": f"a {tiny.CLASSES[label]} thing {number}",
        "flac": tiny.flac(250.0 * 1.5**label, phase=number),
        "json": {"label": label},
    }


@pytest.fixture
def command(data: Path, tmp_path: Path) -> Callable[..., int]:
    """The command on the small data."""

    def run(*words: str, settings: Settings = SMALL) -> int:
        folders = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
        return compare.main([*folders, "--workers", "1", *words], settings)

    return run


# What is missing


@pytest.mark.parametrize("share", MISSING)
def test_each_modality_is_absent_with_the_stated_probability_and_independently(share: float) -> None:
    there = presence(0, KEYS, MODALITIES, share)
    tolerance = 4 * (share * (1 - share) / len(KEYS)) ** 0.5
    for mask in there.values():
        assert float((~mask).float().mean()) == pytest.approx(share, abs=tolerance)
    for one, other in itertools.combinations(there.values(), 2):
        assert float((~one & ~other).float().mean()) == pytest.approx(share**2, abs=tolerance + 1e-9)
    nothing = ~torch.stack(list(there.values())).any(dim=0)
    assert float(nothing.float().mean()) == pytest.approx(share**3, abs=tolerance + 1e-9)


def test_what_is_missing_depends_on_seed_key_and_modality_alone() -> None:
    there, backwards = presence(1, KEYS, MODALITIES, 0.3), presence(1, KEYS[::-1], MODALITIES[::-1], 0.3)
    for name in MODALITIES:
        assert torch.equal(there[name], backwards[name].flip(0))
        shard = presence(1, KEYS[100:200], [name], 0.3)[name]  # as a rank with a part of the samples would find it
        assert torch.equal(shard, there[name][100:200])
    assert not torch.equal(there["image"], presence(2, KEYS, MODALITIES, 0.3)["image"])


def test_what_is_missing_at_30_percent_is_missing_at_50() -> None:
    assert all(is_present(0, key, "text", 0.3) for key in KEYS if is_present(0, key, "text", 0.5))


# What is prepared and trained


def test_cached_spectrograms_are_those_of_the_audio_encoder() -> None:
    waveforms = (torch.randn(3, 3200).clamp(-1, 1) * 3000).to(torch.int16)
    cached, plain = (kind(16, seconds=0.2, width=8) for kind in (CachedMelEncoder, MelAudioEncoder))
    cached.load_state_dict(plain.state_dict())
    kept = cached.mel(waveforms).half()  # as the cache has them
    for training in (False, True):
        found = []
        for encoder, inputs in ((cached, kept), (plain, waveforms)):
            torch.manual_seed(0)  # of the masks
            found.append(encoder.train(training)(inputs))
        torch.testing.assert_close(*found, atol=2e-3, rtol=0)


def test_prepared_samples_come_from_the_cache_the_second_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_split(data / "plain", "train", SMALL, tmp_path, train=True)
    monkeypatch.setattr("benchmarks.compare.cache.prepare", None)
    second = load_split(data / "plain", "train", SMALL, tmp_path, train=True)
    for name in MODALITIES:
        assert first.inputs[name].shape[:2] == (2, 48)
        assert np.array_equal(first.inputs[name], second.inputs[name])
    assert not np.array_equal(first.inputs["image"][0], first.inputs["image"][1])  # two draws
    with pytest.raises(TypeError):  # other pixels are prepared anew
        load_split(data / "plain", "train", replace(SMALL, image_size=24), tmp_path, train=True)


def test_a_training_is_the_same_each_time_and_learns(data: Path, tmp_path: Path) -> None:
    longer = replace(SMALL, epochs={"joint": 30, "plain": 30})
    training = load_split(data / "plain", "train", longer, tmp_path, train=True)
    testing = load_split(data / "plain", "test_both", longer, tmp_path, train=False)
    cell = Cell("pairwise CLIP", "plain", 0.3, 0)
    one, other = train(cell, longer, training), train(cell, longer, training)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    figures = evaluate(one, "plain", testing)
    assert list(figures) == list(settings.SINGLE)
    mean = sum(found["recall@1"] for found in figures.values()) / 6
    assert mean > 2 * figures["text->image"]["chance_recall@1"]


@pytest.mark.parametrize("objective", BY_NAME)
@pytest.mark.parametrize("task", TASKS)
def test_every_objective_trains_with_half_of_all_missing(
    objective: str, task: str, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.getbasetemp() / "compare-cache"
    row = compare.run_cell(Cell(objective, task, 0.5, 1), SMALL, data, cache)
    assert 0 <= row["recall@1"] <= 1 and row["chance"] == pytest.approx(1 / 6, abs=0.01)
    assert list(row["directions"]) == ([settings.JOINT] if task == "joint" else list(settings.SINGLE))


# The command


def test_finished_cells_are_skipped_and_changed_settings_measured_again(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--only", "pairwise CLIP", "--only", "GRAM", "--task", "plain", "--missing", "0", "--seeds", "2")
    assert command(*words) == 0
    out = tmp_path / "out" / "compare.json"
    result = json.loads(out.read_text())
    assert [(row["objective"], row["seed"]) for row in result["rows"]] == [
        ("pairwise CLIP", 0),
        ("pairwise CLIP", 1),
        ("GRAM", 0),
        ("GRAM", 1),
    ]
    assert result["cells"] == {"planned": len(cells()), "done": 4}
    assert result["machine"]["cpus"] and result["versions"]["torch"]
    assert result["settings"]["epochs"] == SMALL.epochs
    assert min(Image.open(tmp_path / "out" / "compare.png").size) > 400
    assert "ETA" in capsys.readouterr().err

    asked: list[Cell] = []
    ran = compare.run_cell
    monkeypatch.setattr(compare, "run_cell", lambda cell, **rest: (asked.append(cell), ran(cell, **rest))[1])
    assert command(*words) == 0 and asked == []
    assert json.loads(out.read_text())["rows"] == result["rows"]
    assert command("--only", "GRAM", "--task", "plain", "--missing", "0.3", "--seeds", "1") == 0
    assert asked == [Cell("GRAM", "plain", 0.3, 0)]
    assert command(*words[:2], *words[4:8], "--seeds", "1", settings=replace(SMALL, lr=1e-3)) == 0
    assert asked[1:] == [Cell("pairwise CLIP", "plain", 0.0, 0)]
    assert len(json.loads(out.read_text())["rows"]) == 5  # the new row took the place of the old


def test_a_run_that_is_stopped_keeps_its_finished_cells(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = compare.run_cell

    def stop_at_the_second(cell: Cell, **rest: Any) -> dict[str, Any]:
        if cell.objective == "GRAM":
            raise KeyboardInterrupt
        return ran(cell, **rest)

    monkeypatch.setattr(compare, "run_cell", stop_at_the_second)
    words = ("--only", "SigLIP", "--only", "GRAM", "--task", "joint", "--missing", "0", "--seeds", "1")
    assert command(*words) == 130
    assert [row["objective"] for row in json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]] == [
        "SigLIP"
    ]
    assert "same command" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.json"]  # nothing half written


@pytest.mark.parametrize("content", ["{", "[]", '{"row": 1}'])
def test_a_file_that_is_no_result_is_not_overwritten(
    content: str, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text(content)
    assert command("--table") == 2
    assert (tmp_path / "out" / "compare.json").read_text() == content
    assert "compare.json" in capsys.readouterr().err
    with pytest.raises(DataError, match="not a result"):
        results.read(tmp_path / "out" / "compare.json")


def test_samples_with_gaps_are_refused(tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gaps of the data would add to those of the comparison, unseen."""
    (tmp_path / "joint").symlink_to(tiny_shards)
    words = ["--data", str(tmp_path), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path), "--task", "joint"]
    assert compare.main([*words, "--workers", "1"], SMALL) == 2
    assert "train-0-0003 lacks a modality" in capsys.readouterr().err
    assert not (tmp_path / "compare.json").exists()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_one_line(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "run_cell", _die)
    assert command("--only", "GRAM", "--task", "joint", "--missing", "0", "--workers", "2") == 2
    assert "process died" in capsys.readouterr().err.splitlines()[-1]


def _die(cell: Cell, **_: Any) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.mark.parametrize("words", [("--only", "CLIP2"), ("--missing", "0.4"), ("--seeds", "9"), ("--task", "both")])
def test_wrong_words_are_refused(words: tuple[str, ...], command: Callable[..., int]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command(*words)


def test_the_cells_that_tell_most_come_first() -> None:
    order = cells()
    assert len(order) == len(set(order)) == len(BY_NAME) * len(TASKS) * len(MISSING) * len(SEEDS)
    assert {(c.missing, c.seed) for c in order[: len(BY_NAME) * 2]} == {(0.0, 0)}
    assert [c.missing for c in order] == sorted(c.missing for c in order)


def test_a_digest_depends_on_what_the_figures_depend_on() -> None:
    cell = Cell("Symile", "plain", 0.3, 1)
    first = digest(cell, SMALL, "f")
    assert first == digest(Cell(**asdict(cell)), replace(SMALL), "f")
    others = [
        replace(cell, seed=2),
        replace(cell, missing=0.5),
        replace(cell, task="joint"),
        replace(cell, objective="GRAM"),
    ]
    changed = [digest(other, SMALL, "f") for other in others] + [digest(cell, SMALL, "g")]
    changed += [
        digest(cell, replace(SMALL, lr=1.0), "f"),
        digest(cell, replace(SMALL, epochs={"joint": 1, "plain": 2}), "f"),
    ]
    assert len({first, *changed}) == 1 + len(changed)
    assert first == digest(cell, replace(SMALL, epochs={"joint": 9, "plain": 1}), "f")  # of the other task


# Table and picture


def row(objective: str, task: str, missing: float, seed: int, recall: float) -> dict[str, Any]:
    return {
        **{"objective": objective, "task": task, "missing": missing, "seed": seed},
        **{"recall@1": recall, "chance": 1 / 64, "directions": {}, "seconds": 1.0, "digest": ""},
    }


def test_figures_are_the_mean_and_the_sample_deviation_over_seeds() -> None:
    rows = [row("Symile", "joint", 0.0, seed, recall) for seed, recall in enumerate((0.5, 0.6, 0.7))]
    rows.append(row("GRAM", "plain", 0.5, 0, 0.25))
    assert str(table.figure(rows, "Symile", "joint", 0.0)) == "60.0 ± 10.0"
    assert str(table.figure(rows[:2], "Symile", "joint", 0.0)) == "55.0 ± 7.1 (2 seeds)"
    lines = table.markdown(rows)
    assert lines[0].startswith("| objective | joint, 0 % missing | joint, 30 % missing |")
    assert "| Symile | 60.0 ± 10.0 | - | - | - | - | - |" in lines
    assert "| GRAM | - | - | - | - | - | 25.0 (1 seed) |" in lines
    assert len(lines) == 2 + len(BY_NAME)


def test_names_at_the_ends_of_lines_do_not_meet() -> None:
    heights = [10.0, 10.1, 10.2, 40.0, 12.0]
    placed = spread_out(heights, 3.0)
    assert placed[3] == 40.0
    assert [placed[i] for i in (0, 1, 2, 4)] == pytest.approx([6.075, 9.075, 12.075, 15.075])
    gaps = np.diff(sorted(spread_out([5.0, 5.0, 5.0, 8.0, 9.0, 14.0], 2.0)))
    assert gaps.min() >= 2.0 - 1e-9


def test_a_picture_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    rows = [row(name, "joint", share, 0, 0.1) for name in BY_NAME for share in MISSING[:2]]
    for number, some in enumerate(([], rows[:1], rows)):
        plot(some, tmp_path / f"{number}.png")
        assert min(Image.open(tmp_path / f"{number}.png").size) > 400


# The committed result


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(RESULT.read_text())
    return result


def test_the_committed_rows_are_of_todays_settings(committed: dict[str, Any]) -> None:
    assert committed["settings"] == json.loads(json.dumps({**asdict(Settings()), "objectives": results.describe()}))
    found = [results.cell_of(row) for row in committed["rows"]]
    assert len(found) == len(set(found)) == committed["cells"]["done"]
    assert set(found) <= set(cells()) and committed["cells"]["planned"] == len(cells())
    for measured in committed["rows"]:
        parts = [part["recall@1"] for part in measured["directions"].values()]
        assert measured["recall@1"] == pytest.approx(sum(parts) / len(parts))


def test_the_readme_has_the_generated_table(committed: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text()
    for line in table.markdown(committed["rows"]):
        assert line in readme
    assert "benchmarks/results/compare.png" in readme


def test_symile_passes_the_ceiling_that_pairs_do_not(committed: dict[str, Any]) -> None:
    whole = {name: table.figure(committed["rows"], name, "joint", 0.0) for name in BY_NAME}
    assert all(found is not None and found.seeds == len(SEEDS) for found in whole.values())
    means = {name: found.mean for name, found in whole.items() if found is not None}
    assert means["Symile"] > 0.5 + 0.05
    for pairs in ("pairwise CLIP", "SigLIP", "modality-pairwise"):
        assert means[pairs] < 0.5 + 0.03
