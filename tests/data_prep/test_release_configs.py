"""Every config of a published data set: accepted by the command line, and trained on a small release of the real shape.

The towers of the training are small ones, as a second --config gives them: nothing is downloaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mmrep.encoders
from data_prep import audiocaps, candidates, clotho, cmu_mosei, coco, symile_m3, symile_mimic
from mmrep.cli import main as mmrep_main
from tests.data_prep import releases

ROOT = Path(__file__).parents[2]
HEAD = {"projection": True}
"""What a config says of the head holds for the small encoder too, unless it is told otherwise."""
IMAGE = {"class_path": "mmrep.encoders.ConvImageEncoder", "init_args": {"image_size": 16, "width": 8} | HEAD}
TEXT = {"class_path": "mmrep.encoders.NgramTextEncoder", "init_args": {"width": 16, "buckets": 256} | HEAD}
AUDIO = {"class_path": "mmrep.encoders.MelAudioEncoder", "init_args": {"seconds": 0.2, "mels": 16, "width": 16}}
LABS = {"class_path": "mmrep.encoders.TabularEncoder", "init_args": {"size": 50, "width": 16, "layers": 1}}


def series(channels: int, length: int = 16) -> dict[str, Any]:
    sizes = {"channels": channels, "length": length, "width": 8, "stages": 1}
    return {"class_path": "mmrep.encoders.SeriesEncoder", "init_args": sizes}


def prepare_coco(folder: Path) -> list[str]:
    root = folder / "release"
    file = releases.write_karpathy(root)
    return ["--root", str(root), "--karpathy", str(file)]


def prepare_audiocaps(folder: Path) -> list[str]:
    root, clips = folder / "release", folder / "clips"
    return ["--root", str(releases.write_audiocaps(root, clips)), "--audio", str(clips)]


def prepare_cmu_mosei(folder: Path) -> list[str]:
    pytest.importorskip("h5py", reason="pip install 'mmrep[mosei]'")
    root = releases.write_cmu_mosei(folder / "release")
    return ["--root", str(root), "--folds", str(root / "cmu_mosei_std_folds.py")]


def plain(write: Callable[[Path], Path]) -> Callable[[Path], list[str]]:
    return lambda folder: ["--root", str(write(folder / "release"))]


CASES: dict[str, tuple[Callable[[list[str]], int], Callable[[Path], list[str]], dict[str, Any]]] = {
    "coco/clip": (coco.main, prepare_coco, {"image": IMAGE, "text": TEXT}),
    "clotho/clap": (clotho.main, plain(releases.write_clotho), {"audio": AUDIO, "text": TEXT}),
    "audiocaps/clap": (audiocaps.main, prepare_audiocaps, {"audio": AUDIO, "text": TEXT}),
    "symile_m3/symile": (
        symile_m3.main,
        plain(releases.write_symile_m3),
        {"image": IMAGE, "text": TEXT, "audio": AUDIO},
    ),
    "symile_mimic/symile": (
        symile_mimic.main,
        plain(releases.write_symile_mimic),
        {"cxr": IMAGE, "ecg": series(12), "labs": LABS},
    ),
    "cmu_mosei/modality_pairwise": (
        cmu_mosei.main,
        prepare_cmu_mosei,
        {"glove": series(300, 4), "covarep": series(74, 4), "facet": series(35, 4)},
    ),
}


for release in ("symile_m3", "symile_mimic"):
    CASES[f"{release}/clip"] = CASES[f"{release}/symile"]


def test_every_config_of_a_release_is_here() -> None:
    folders = {case.split("/")[0] for case in CASES}
    found = {p.relative_to(ROOT / "configs").with_suffix("").as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert {name for name in found if name.split("/")[0] in folders} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_config_is_accepted_as_it_is(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command line understood of it is what it says; nothing is built."""
    path = ROOT / "configs" / f"{case}.yaml"
    with pytest.raises(SystemExit) as ended:
        mmrep_main(["fit", "--config", str(path), "--print_config"])
    assert not ended.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    given = yaml.safe_load(path.read_text())["model"]["init_args"]
    assert set(parsed["encoders"]) == set(given["encoders"]) == set(CASES[case][2])
    for name, encoder in given["encoders"].items():
        taken = parsed["encoders"][name]
        assert taken["class_path"] == encoder["class_path"]
        assert {key: taken["init_args"][key] for key in encoder["init_args"]} == encoder["init_args"]


@pytest.mark.parametrize("release", ["symile_m3", "symile_mimic"])
def test_symile_and_clip_are_compared_with_equal_encoders_and_data(release: str) -> None:
    symile, clip = (
        yaml.safe_load((ROOT / f"configs/{release}/{name}.yaml").read_text()) for name in ("symile", "clip")
    )
    assert all(symile[key] == clip[key] for key in ("data", "trainer", "seed_everything"))
    mine, rival = symile["model"]["init_args"], clip["model"]["init_args"]
    assert math.log(rival["init_temperature"]) == pytest.approx(-mine["init_logit_scale"], abs=1e-4)
    own = {"negatives", "init_logit_scale", "reduction", "init_temperature"}
    assert {k: v for k, v in mine.items() if k not in own} == {k: v for k, v in rival.items() if k not in own}


@pytest.mark.parametrize("case", ["symile_mimic/symile", "cmu_mosei/modality_pairwise"])
def test_config_without_pretrained_towers_builds_its_model(case: str) -> None:
    given = yaml.safe_load((ROOT / "configs" / f"{case}.yaml").read_text())["model"]["init_args"]
    with torch.device("meta"):
        encoders = {
            name: getattr(mmrep.encoders, encoder["class_path"].rsplit(".", 1)[1])(
                given["embed_dim"], **encoder["init_args"]
            )
            for name, encoder in given["encoders"].items()
        }
    last = [
        list(encoder.head.modules())[-1] for encoder in encoders.values()
    ]  # of a head of layers, or the head itself
    assert [layer.out_features for layer in last] == [given["embed_dim"]] * len(given["encoders"])


@pytest.mark.parametrize("case", CASES)
def test_config_trains_on_a_small_release(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the release to two steps, a validation, a model folder, and the judge that its header names."""
    command, prepare, encoders = CASES[case]
    path, out = ROOT / "configs" / f"{case}.yaml", tmp_path / "shards"
    assert command([*prepare(tmp_path), "--out", str(out), "--workers", "1"]) == 0
    tiny = {
        "model": {
            "class_path": yaml.safe_load(path.read_text())["model"]["class_path"],
            "init_args": {"embed_dim": 16, "encoders": encoders, "warmup_steps": 0}
            | ({"freeze": None} if case.startswith("symile_m3/") else {}),
        },
        "data": {"path": str(out), "global_batch_size": 4, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "max_steps": 2, "check_val_every_n_epoch": 1},
    }
    override = tmp_path / "tiny.yaml"
    override.write_text(yaml.safe_dump(tiny))
    words = ["fit", "--config", str(path), "--config", str(override), "--runs", str(tmp_path / "runs"), "--name", "run"]
    words += ["--trainer.num_sanity_val_steps", "0", "--trainer.log_every_n_steps", "1"]
    assert mmrep_main([*words, "--trainer.limit_train_batches", "2"]) == 0
    model = mmrep.load(tmp_path / "runs" / "run")
    assert set(model.modalities) == set(encoders)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    _judge(case, tmp_path / "runs" / "run", out, tmp_path / "figures.json", capsys)


def _judge(case: str, run: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(run), "--data", str(data), "--split", "test", "--out", str(out)]
    if case.startswith("symile_mimic/"):
        assert candidates.main(words) == 0
        figures = json.loads(out.read_text())
        assert (figures["queries"], figures["chance"]) == (12, pytest.approx(0.1)) and 0 <= figures["accuracy"] <= 1
        return
    if case == "cmu_mosei/modality_pairwise":
        words += ["--modality", "glove", "--label", "happy"]
        assert mmrep_main(["eval", "probe", *words]) == 0
        return
    assert mmrep_main(["eval", "retrieval", *words]) == 0
    directions = json.loads(out.read_text())["directions"]
    expected = {
        "coco/clip": {"text->image": (10, 2), "image->text": (2, 10)},
        "clotho/clap": {"text->audio": (20, 4), "audio->text": (4, 20)},
        "audiocaps/clap": {"text->audio": (15, 3), "audio->text": (3, 15)},
        "symile_m3/symile": {"audio+text->image": (6, 6)},
        "symile_m3/clip": {"audio+text->image": (6, 6)},
    }[case]
    for name, counts in expected.items():
        assert (directions[name]["queries"], directions[name]["candidates"]) == counts
        assert math.isfinite(directions[name]["recall@1"])
