"""`mmrep export`: folders that others load, with a model card that says where the model comes from; and the hub."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mmrep
from mmrep.cli import main
from mmrep.encoders import FeaturesEncoder, NgramTextEncoder, OpenClipImageEncoder, OpenClipTextEncoder
from mmrep.encoders.open_clip import LOCAL
from mmrep.errors import CheckpointError, ConfigError
from mmrep.interop import export as export_module
from mmrep.interop.export import export, merge, push_to_hub
from mmrep.interop.model_card import CardFacts
from mmrep.losses import PairwiseCLIPLoss, SymileLoss
from mmrep.model import MultimodalModel
from tests.interop.open_clip_models import NATIVE, write_open_clip_folder
from tests.interop.test_open_clip import TEXTS, features, pictures, theirs
from tests.killed import ended, forked

RESULT = {
    "task": "retrieval",
    "data": "somewhere/own",
    "split": "test",
    "directions": {
        "a->b": {"queries": 7, "candidates": 5, "recall@1": 0.5, "recall@5": 0.75, "recall@10": 1, "mrr": 0.61}
    },
}


CLASSIFICATION = {
    "task": "classification",
    "data": "somewhere/own",
    "split": "test",
    "modality": "a",
    "label": "kind",
    "language": "de",
    "n": 1200,
    "classes": 3,
    "acc1": 0.5,
    "acc1_ci95": [0.4, 0.6],
    "acc5": None,
    "mean_per_class_recall": 0.4,
    "chance_acc1": 1 / 3,
}
FEATURES = {"accuracy": 0.75, "accuracy_ci95": [0.7, 0.8], "chance": 0.5, "classes": 2, "test": 40, "l2": 1e-05}
PROBE = {
    "task": "probe",
    "method": "ridge",
    "data": "somewhere/own",
    "modality": "a",
    "label": "kind",
    "split": "test",
    "features": {"trained": FEATURES, "random weights": FEATURES | {"accuracy": 5e-05}},
}


def run_folder(tmp: Path) -> Path:
    """What training leaves: a model, its config, and data that say their licence."""
    run = tmp / "runs" / "mine"
    encoders = {"a": FeaturesEncoder(4, size=3), "b": NgramTextEncoder(4, width=8, buckets=99)}
    MultimodalModel(encoders, SymileLoss(modalities=["a", "b"], embed_dim=4)).save_pretrained(run / "model")
    data = tmp / "own"
    data.mkdir()
    index = {
        "shards": [{"name": "train-0.tar", "samples": 1200}, {"name": "test-0.tar", "samples": 34}],
        "splits": {"train": ["train-0.tar"], "test": ["test-0.tar"]},
        "fingerprint": "ab" * 32,
        "provenance": {"dataset": "own set"},
        "licences": {"pictures": {"spdx": "CC-BY-4.0"}},
    }
    (data / "index.json").write_text(json.dumps(index))
    config = {
        "seed_everything": 3,
        "model": {"class_path": "mmrep.modules.Symile", "init_args": {"lr": 0.002}},
        "data": {"path": str(data), "global_batch_size": 64},
        "trainer": {"max_epochs": 9},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp / "result.json").write_text(json.dumps(RESULT))
    return run


def test_a_model_folder_comes_with_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path)
    words = ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--licence", "apache-2.0"]
    assert main(["export", *words, "--result", str(tmp_path / "result.json")]) == 0
    assert "README.md, config.json, model.safetensors" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0" and header["library_name"] == "mmrep" and "multimodal" in header["tags"]
    for fact in (
        "# mine",
        "| a | FeaturesEncoder |",
        "SymileLoss(",
        "own set, fingerprint `abababababababab`; train: 1,200 samples; test: 34 samples",
        "- pictures: CC-BY-4.0",
        "- module: mmrep.modules.Symile",
        "- lr: 0.002",
        "- global batch size: 64",
        "- epochs: 9",
        "| `a->b` | 7 | 5 | 50.0 | 75.0 | 100.0 | 0.610 |",
        "## Licence\n\napache-2.0",
    ):
        assert fact in card, fact
    assert str(tmp_path) not in card, "no path of this machine"
    one, other = mmrep.load(run), mmrep.load(tmp_path / "out")
    assert torch.equal(one.encode(b=["x"])["b"], other.encode(b=["x"])["b"])


def test_the_card_holds_the_figures_of_every_kind_of_result(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    figures = dict(RESULT["directions"]["a->b"]) | {"queries": 20000, "recall@1": 5e-05}  # type: ignore[index]  # a dict
    multilabel = {name: CLASSIFICATION[name] for name in ("task", "data", "split", "n", "classes")}
    results = [
        RESULT | {"directions": {"a->b": figures}},
        CLASSIFICATION,
        multilabel | {"mean_average_precision": 0.25},
        PROBE,
    ]
    words = ["--checkpoint", str(run), "--out", str(tmp_path / "out")]
    for number, result in enumerate(results):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
        words += ["--result", str(tmp_path / f"{number}.json")]
    assert main(["export", *words]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "| `a->b` | 20,000 | 5 | 0.0 | 75.0 | 100.0 | 0.610 |",
        "classification on own, split test, modality a, label kind:\n",
        "| prompts | samples | classes | top-1 % | mean per class % | chance % |\n",
        "| de | 1,200 | 3 | 50.0 | 40.0 | 33.3 |",
        "| mAP % |",
        "| 1,200 | 3 | 25.0 |",
        "probe on own, split test, method ridge, modality a, label kind:\n",
        "| features | classes | accuracy % | chance % | samples |\n",
        "| trained | 2 | 75.0 | 50.0 | 40 |",
        "| random weights | 2 | 0.0 | 50.0 | 40 |",
    ):
        assert fact in card, fact


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", '{"task": "retr', "broken file (Unterminated string"),
        ("result.json", "[" * 99999, "broken file ("),
        ("result.json", "[]", "the file holds no mapping"),
        ("result.json", '{"task": "search"}', "not a result of `mmrep eval` (KeyError"),
        ("result.json", '{"task": "retrieval", "directions": {"a->b": 1}}', "not a result of `mmrep eval`"),
        ("result.json", '{"task": "retrieval", "directions": {"a->b": {"mrr": "x"}}}', "not a result of `mmrep eval`"),
        ("result.json", '{"task": "probe"}', "not a result of `mmrep eval`"),
        ("own/index.json", '{"shards": [1]}', "not an index ("),
        ("runs/mine/config.yaml", "model: Symile", "not the config of a run ("),
    ],
)
def test_a_fact_that_is_none_is_one_line_and_leaves_nothing(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path)
    (tmp_path / name).write_text(content)
    words = ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--result", str(tmp_path / "result.json")]
    assert main(["export", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_card_is_made_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> str:
        raise ConfigError("no card")

    run = run_folder(tmp_path)
    facts = CardFacts("mine\ud800")
    export(mmrep.load(run), tmp_path / "named", facts)
    assert "# mine?\n" in (tmp_path / "named" / "README.md").read_text()
    monkeypatch.setattr(export_module, "model_card", fault)
    with pytest.raises(ConfigError, match="no card"):
        export(mmrep.load(run), tmp_path / "out", facts)
    assert not (tmp_path / "out").exists()


def test_the_cards_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    assert main(["export", "--checkpoint", f"open_clip:{LOCAL}{folder}", "--out", str(tmp_path / "out")]) == 0
    monkeypatch.chdir(tmp_path)
    pictures()[0].save("apple.png")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("FOLDER_OR_HUB_ID", str(tmp_path / "out"))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["scores"].shape == (1, 1)
    assert "The authors state none." in card and "Not recorded." in card


def test_a_checkpoint_goes_to_open_clip_from_the_command_line(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    want = features(theirs(folder))
    for layout in ("custom-text", "clip"):
        out = tmp_path / layout
        words = ["--checkpoint", str(folder), "--format", "open_clip", "--layout", layout, "--out", str(out)]
        assert main(["export", *words]) == 0
        got = features(theirs(out))
        assert all(torch.equal(want[name], got[name]) for name in want) and (out / "README.md").is_file()


def test_adapters_are_merged_on_the_way_out(tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    lora: dict[str, Any] = {}  # all its defaults
    encoders: dict[str, Any] = {
        "image": OpenClipImageEncoder(24, pretrained=f"{LOCAL}{folder}", projection=False, lora=lora),
        "text": OpenClipTextEncoder(24, pretrained=f"{LOCAL}{folder}", projection=False, lora=lora),
    }
    model = MultimodalModel(encoders, PairwiseCLIPLoss()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "adapted")
    want = model.encode(image=pictures(), text=TEXTS)
    assert not torch.allclose(want["image"], features(theirs(folder))["image"], atol=1e-3), "the adapters do something"
    words = ["--checkpoint", str(tmp_path / "adapted"), "--format", "open_clip", "--out", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    got = features(theirs(tmp_path / "out"))
    assert torch.allclose(got["image"], want["image"], atol=1e-5) and torch.allclose(
        got["text"], want["text"], atol=1e-5
    )
    assert merge(model) is not model and any("lora_" in name for name in model.state_dict()), "the model keeps its own"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "open_klip"], "did you mean 'open_clip'"),
        (["--format", "open_clip"], "no modality 'image'"),
        (
            ["--format", "open_clip", "--image", "a", "--text", "b"],
            "is a FeaturesEncoder, which open_clip does not have",
        ),
        (["--result", "nowhere.json"], "no such result"),
        (["--data", "nowhere"], "no index.json"),
        (["--out", "."], "something is there already"),
        (["--checkpoint", "nowhere"], "no model"),
    ],
)
def test_wrong_use_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path)
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


class LocalHub:
    """The hub's client, with a folder as the hub."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private = folder, None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private = private  # type: ignore[assignment]  # set once
        (self.folder / repo_id).mkdir(parents=True)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return f"local/{repo_id}"


def test_a_pushed_model_is_loaded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    from mmrep.encoders import hub

    local = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: local)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub" / name))
    monkeypatch.setattr(hub, "online", lambda: True)
    run = run_folder(tmp_path)
    words = ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--push-to-hub", "org/mine"]
    assert main(["export", *words]) == 0
    assert "local/org/mine" in capsys.readouterr().out and local.private is True
    monkeypatch.chdir(tmp_path / "hub" / "..")
    again = mmrep.load("org/mine")
    assert torch.equal(again.encode(b=["x"])["b"], mmrep.load(run).encode(b=["x"])["b"])


def test_a_push_without_a_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"cannot be uploaded.*by hand") as caught:
        push_to_hub(tmp_path, "org/mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["", "model", "checkpoints/last.ckpt"])
def test_the_card_tells_of_the_run_whatever_of_it_is_given(given: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "checkpoints").mkdir()
    model = mmrep.load(run)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "mmrep_model": model.config()}, run / "checkpoints" / "last.ckpt")
    assert main(["export", "--checkpoint", str(run / given), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# mine\n" in card and "- lr: 0.002" in card and "own set" in card


def test_a_source_that_is_no_run_takes_no_facts_of_the_folder_it_is_called_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE)
    monkeypatch.chdir(run_folder(tmp_path))
    assert main(["export", "--checkpoint", f"open_clip:{LOCAL}{folder}", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not recorded." in card and "## Training" not in card


@pytest.mark.parametrize("form", ["mmrep", "open_clip"])
def test_a_full_disk_is_one_line(form: str, tmp_path: Path) -> None:
    model = mmrep.load(write_open_clip_folder(tmp_path / "in", NATIVE)).save_pretrained(tmp_path / "model")
    words = ["export", "--checkpoint", str(model), "--out", str(tmp_path / "out"), "--format", form]

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return main(words)

    assert ended(forked(work, tmp_path / "log")) == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("mmrep: error: the model could not be written (")
