"""What `mmrep.load` must refuse, in one line and without running anything: malicious, broken and foreign checkpoints."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

import mmrep
from mmrep.encoders import FeaturesEncoder, OpenClipTextEncoder
from mmrep.errors import CheckpointError, ConfigError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MOST_INPUT_BYTES, MultimodalModel
from mmrep.weights import BYTES_BESIDE_WEIGHTS
from tests.interop.open_clip_models import NATIVE, write_open_clip_folder


class Evil:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def model_folder(folder: Path) -> Path:
    encoders = {"a": FeaturesEncoder(4, size=3), "b": FeaturesEncoder(4, size=2)}
    return MultimodalModel(encoders, PairwiseCLIPLoss()).save_pretrained(folder)


def truncated(tmp: Path) -> str:
    folder = model_folder(tmp / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return str(folder)


def oversized_header(tmp: Path) -> str:
    folder = model_folder(tmp / "m")
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")
    return str(folder)


def wrong_shapes(tmp: Path) -> str:
    folder = model_folder(tmp / "m")
    weights = load_file(folder / "model.safetensors")
    weights = {name: torch.zeros(*tensor.shape, 2) for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def without(name: str) -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        folder = model_folder(tmp / "m")
        (folder / name).unlink()
        return str(folder)

    return make


def with_config(change: dict[str, Any] | str) -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        folder = model_folder(tmp / "m")
        path = folder / "config.json"
        path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
        return str(folder)

    return make


def pickled(suffix: str, protocol: str = "torch") -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        path = tmp / f"evil{suffix}"
        content = {"state_dict": {"x": torch.zeros(1)}, "hyper_parameters": Evil(tmp / "ran")}
        if protocol == "torch":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        return str(path)

    return make


def open_clip_with(name: str, evil: bool) -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        folder = write_open_clip_folder(tmp / "o", NATIVE)
        weights = load_file(folder / "open_clip_model.safetensors")
        (folder / "open_clip_model.safetensors").unlink()
        if name:
            torch.save({"state_dict": weights, **({"x": Evil(tmp / "ran")} if evil else {})}, folder / name)
        return f"open_clip:local-dir:{folder}"

    return make


def empty_folder(tmp: Path) -> str:
    (tmp / "empty").mkdir()
    return str(tmp / "empty")


def with_settings(kind: str = "NgramTextEncoder", /, **settings: Any) -> Callable[[Path], str]:
    """A model folder with an encoder of whatever settings."""

    def make(tmp: Path) -> str:
        folder = model_folder(tmp / "m")
        config = json.loads((folder / "config.json").read_text())
        config["encoders"]["a"] = {"class": kind, "settings": settings}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


def checkpoint_with(**changed: Any) -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        model = mmrep.load(model_folder(tmp / "m"))
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": weights, "mmrep_model": model.config(), **changed}, tmp / "last.ckpt")
        return str(tmp / "last.ckpt")

    return make


def tokenizer_with(files: dict[str, str], **text: Any) -> Callable[[Path], str]:
    """A model folder whose text tower has a tokenizer of transformers, and code beside it that would make a file."""

    def make(tmp: Path) -> str:
        code = f"open({str(tmp / 'ran')!r}, 'w')\nfrom transformers import PreTrainedTokenizer\n"
        code += "class Tok(PreTrainedTokenizer):\n    pass\n"
        tower = {"embed_dim": 8, "text_cfg": {**NATIVE["text_cfg"], "hf_tokenizer_name": "x", **text}}
        encoders = {"a": OpenClipTextEncoder(8, {**NATIVE, "embed_dim": 8}), "b": FeaturesEncoder(8, size=2)}
        folder = MultimodalModel(encoders, PairwiseCLIPLoss()).save_pretrained(tmp / "m")
        config = json.loads((folder / "config.json").read_text())
        config["encoders"]["a"]["settings"]["architecture"] = tower
        config["files"] = {"a": list(files)}
        (folder / "files" / "a").mkdir(parents=True)
        for name, content in files.items():
            (folder / "files" / "a" / name).write_text(content.replace("CODE", code))
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


OWN_CODE = {
    "config.json": '{"model_type": "bert"}',
    "tokenizer_config.json": '{"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["evil.Tok", null]}}',
}
BROKEN: dict[str, tuple[Callable[[Path], str], str]] = {
    "truncated safetensors": (truncated, "broken file"),
    "a header that claims terabytes": (oversized_header, "broken file"),
    "wrong shapes": (wrong_shapes, "belong to another config: encoders.a: 7 of another shape"),
    "no config": (without("config.json"), "no model"),
    "no weights": (without("model.safetensors"), "no model.safetensors"),
    "a config that is no JSON": (with_config("{"), "broken file"),
    "a config that is a list": (with_config("[1]"), "broken"),
    "a config of another format": (with_config({"format": "mmrep-model-9"}), "this version reads mmrep-model-1"),
    "a config that names code": (
        with_config({"encoders": {"a": {"class": "os.system", "settings": {}}}}),
        "names the class 'os.system'",
    ),
    "a config with files outside": (with_config({"files": {"a": ["../../../x"]}}), "is no text of a model's"),
    "a file that is code": (tokenizer_with({**OWN_CODE, "evil.py": "CODE"}), "is no text of a model's"),
    "a tokenizer that names code": (tokenizer_with(OWN_CODE), "names code of its own"),
    "a tokenizer that is trusted by its config": (
        tokenizer_with({"config.json": "{}"}, tokenizer_kwargs={"trust_remote_code": True}),
        r"sets tokenizer_kwargs \['trust_remote_code'\]",
    ),
    "a network that names code": (
        with_settings(
            "HFAudioEncoder",
            config={"model_type": "clap_text_model", "auto_map": {"AutoModel": "evil.M"}, "_name_or_path": "."},
            extractor={"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000},
        ),
        "transformers cannot build 'clap_text_model'",
    ),
    "an image network elsewhere": (
        with_settings(
            "OpenClipImageEncoder",
            architecture={"embed_dim": 4, "vision_cfg": {"timm_model_name": "hf-hub:a/b", "image_size": 16}},
        ),
        "which timm does not list",
    ),
    "a modality that is a path": (with_config({"share": {"../../../x": "b"}}), "must be plain names"),
    "a checkpoint with files outside": (
        checkpoint_with(mmrep_files={"a": {"../../../x.txt": "x"}}),
        "files of an encoder have plain names",
    ),
    "a checkpoint whose files are none": (
        checkpoint_with(mmrep_files={"a": {"x.txt": 1}}),
        "not a checkpoint of mmrep",
    ),
    "a checkpoint whose weights are a list": (checkpoint_with(state_dict=[1]), "not a checkpoint of mmrep"),
    "a checkpoint whose weights are numbers": (checkpoint_with(state_dict={"model.x": 1}), "belong to another config"),
    "a config without end": (with_config("[" * 200_000), "broken"),
    "negative sizes": (with_settings(width=-1), "broken model config"),
    "no buckets": (with_settings(buckets=0), "broken model config"),
    "a network of petabytes": (with_settings(buckets=10**12, width=256), "much larger than the weights"),
    "a network of too many parts": (
        with_settings("SeriesEncoder", width=1024, stages=2, blocks=10**9),
        "much larger than the weights",
    ),
    "pictures of terabytes": (
        with_settings(
            "TimmImageEncoder",
            architecture="test_resnet",
            preprocessing={
                "size": 10**6,
                "resize": 10**6,
                "squash": True,
                "interpolation": "bicubic",
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
            },
        ),
        "much larger than the weights|bytes, more than",
    ),
    "clips of days": (with_settings("MelAudioEncoder", seconds=10000.0), "an input of 'a' has 320,000,000 bytes"),
    "a pickled object in a .ckpt": (pickled(".ckpt"), "could run code.*convert it where it was made"),
    "a pickled object in a .pt": (pickled(".pt"), "could run code"),
    "a plain pickle": (pickled(".ckpt", "pickle"), "could run code|not a whole checkpoint|not a safe"),
    "a pickled object in an open_clip folder": (
        open_clip_with("open_clip_pytorch_model.bin", True),
        "could run code",
    ),
    "an open_clip folder without weights": (open_clip_with("", False), "no weights beside the config"),
    "an empty folder": (empty_folder, "no model"),
    "a hub id without a network": (lambda _: "some-org/some-model", "no network to fetch it from"),
    "an open_clip tag without a network": (lambda _: "open_clip:ViT-B-32/laion2b_s34b_b79k", "no network to fetch it"),
    "an open_clip hub id without a network": (lambda _: "open_clip:hf-hub:a/b", "no network to fetch it from"),
    "nothing": (lambda tmp: str(tmp / "nothing" / "here"), "no model"),
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_loaded_is_one_clear_line(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    source = make(tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        mmrep.load(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert not (tmp_path / "ran").exists(), "nothing of it was run"


def test_weights_only_torch_files_of_open_clip_are_taken(tmp_path: Path) -> None:
    """As older exports have them, with what DDP puts before every name."""
    folder = write_open_clip_folder(tmp_path / "o", NATIVE)
    want = mmrep.load(folder).encode(text=["a"])["text"]
    weights = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": {f"module.{n}": t for n, t in weights.items()}, "epoch": 3}, folder / "model.pth")
    assert torch.equal(mmrep.load(folder).encode(text=["a"])["text"], want)


def test_the_conversion_that_is_advised_works(tmp_path: Path) -> None:
    """A checkpoint with a path among its settings, as Lightning leaves them, becomes safetensors by the line given."""
    folder = write_open_clip_folder(tmp_path / "o", NATIVE)
    weights = load_file(folder / "open_clip_model.safetensors")
    torch.save({"state_dict": weights, "hyper_parameters": {"folder": tmp_path}}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError) as caught:
        mmrep.load(tmp_path / "old.ckpt", config=folder / "open_clip_config.json")
    call = re.search(r"safetensors\.torch\.save_file\(.*\)$", str(caught.value))
    assert call is not None
    source = open_clip.create_model(f"local-dir:{folder}")
    line = call[0].replace("weights.safetensors", str(tmp_path / "weights.safetensors"))
    exec(line, {"safetensors": safetensors, "model": source})
    again = mmrep.load(tmp_path / "weights.safetensors", config=folder / "open_clip_config.json")
    assert torch.equal(again.encode(text=["a"])["text"], mmrep.load(folder).encode(text=["a"])["text"])


def test_without_a_proxy_for_anything_there_is_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from mmrep.encoders import hub

    def nowhere(*_: object) -> None:
        raise OSError("no address")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(hub, "getproxies", lambda: {"no": "localhost"})
    assert not hub.online()
    monkeypatch.setattr(hub, "getproxies", lambda: {"no": "localhost", "https": "proxy:1"})
    assert hub.online()


def test_the_page_counts_what_is_refused_and_has_the_bounds() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text().split())
    assert f"{len(BROKEN)} ways of a broken or malicious checkpoint are one line each" in page
    assert MOST_INPUT_BYTES == 256 << 20 and "an input of more than 256 MiB" in page
    assert BYTES_BESIDE_WEIGHTS == 1 << 30 and "more than eight times the weights file and 1 GiB" in page
