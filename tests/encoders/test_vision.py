"""Networks of timm and torchvision: the libraries' own features and preprocessing, weights from files, adapters of channels."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torchvision import models

from mmrep.encoders import Encoder, MelTowerAudioEncoder, TimmImageEncoder, TorchvisionImageEncoder
from mmrep.encoders.crops import Crop
from mmrep.errors import CheckpointError, ConfigError
from tests.encoders.sources import PICTURE, TONE

TIMM = ["test_resnet", "test_vit", "test_efficientnet", "convnext_atto", "mobilenetv3_small_050"]
TORCHVISION = ["resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small", "vit_b_32", "swin_t"]


def contract(encoder: Encoder, raw: object) -> None:
    encoder.eval()
    for train in (True, False):
        row = pickle.loads(pickle.dumps(encoder.transform(train)))(raw)
        blank = encoder.empty(2)
        assert blank.shape == (2, *row.shape) and blank.dtype == row.dtype and not blank.any()
    assert encoder.features(row[None]).shape == (1, encoder.feature_dim)
    again = type(encoder)(encoder.embed_dim, **json.loads(json.dumps(encoder.settings))).eval()
    again.load_state_dict(encoder.state_dict())
    assert again.settings == encoder.settings and "pretrained" not in encoder.settings
    assert torch.equal(encoder(row[None]), again(again.transform(False)(raw)[None]))
    assert torch.allclose(
        encoder(row[None]), encoder(torch.stack([row, blank[0]]))[:1], atol=1e-5
    )  # none mixes samples
    layers = [id(parameter) for layer in encoder.layers() for parameter in layer]
    own = {id(p) for name, p in encoder.named_parameters() if not name.startswith("head.")}
    assert len(layers) == len(set(layers)) and set(layers) == own and len(encoder.layers()) > 2


@pytest.mark.parametrize("architecture", TIMM)
def test_timm_gives_timms_pre_logits_on_timms_preprocessing(architecture: str) -> None:
    encoder = TimmImageEncoder(6, architecture).eval()
    contract(encoder, PICTURE)
    network = timm.create_model(architecture, num_classes=7).eval()
    network.load_state_dict(encoder.backbone.state_dict(), strict=False)
    picture = create_transform(**resolve_data_config({}, model=network))(PICTURE)[None]
    ours = encoder.transform(False)(PICTURE)[None]
    assert torch.equal(encoder.standardize(ours), picture)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(picture), pre_logits=True)
        assert torch.allclose(encoder.features(ours), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", TORCHVISION)
def test_torchvision_gives_what_its_classifier_sees(architecture: str) -> None:
    encoder = TorchvisionImageEncoder(6, architecture).eval()
    contract(encoder, PICTURE)
    network = models.get_model(architecture, weights=None).eval()
    network.load_state_dict(encoder.backbone.state_dict(), strict=False)
    seen: list[torch.Tensor] = []
    last = [part for part in network.modules() if isinstance(part, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    picture = models.get_model_weights(architecture).DEFAULT.transforms()(PICTURE)[None]
    ours = encoder.transform(False)(PICTURE)[None]
    assert torch.allclose(encoder.standardize(ours), picture, atol=1e-6)
    with torch.no_grad():
        network(picture)
        assert torch.allclose(encoder.features(ours), seen[0], atol=1e-5)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_weights_from_a_file_without_the_classifier(library: str, suffix: str, tmp_path: Path) -> None:
    make, network = {
        "timm": (TimmImageEncoder, timm.create_model("test_resnet")),
        "torchvision": (TorchvisionImageEncoder, models.shufflenet_v2_x0_5()),
    }[library]
    architecture = "test_resnet" if library == "timm" else "shufflenet_v2_x0_5"
    path = tmp_path / f"weights{suffix}"
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights}, path)
    encoder = make(6, architecture, pretrained=str(path))
    own = encoder.backbone.state_dict()
    assert own and all(torch.equal(tensor, weights[name]) for name, tensor in own.items())
    assert set(weights) - set(own) == {"fc.weight", "fc.bias"}
    torch.save({name: tensor for name, tensor in weights.items() if "running" not in name}, path.with_suffix(".pt"))
    with pytest.raises(CheckpointError, match="missing") as caught:
        make(6, architecture, pretrained=str(path.with_suffix(".pt")))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_first_convolution_is_summed_over_colours_for_spectrograms(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet")
    save_file({name: tensor.clone() for name, tensor in network.state_dict().items()}, tmp_path / "a.safetensors")
    encoder = MelTowerAudioEncoder(6, "test_resnet", pretrained=str(tmp_path / "a.safetensors"), seconds=1.0, mels=32)
    first = network.pretrained_cfg["first_conv"]
    expected = network.get_submodule(first).weight.sum(dim=1, keepdim=True)
    assert torch.allclose(encoder.tower.get_submodule(first).weight, expected, atol=1e-6)  # type: ignore[union-attr,arg-type]  # a convolution


@pytest.mark.parametrize(("architecture", "seconds", "mels"), [("test_resnet", 1.0, 40), ("test_vit", 0.96, 64)])
def test_mel_tower_contract(architecture: str, seconds: float, mels: int) -> None:
    encoder = MelTowerAudioEncoder(6, architecture, seconds=seconds, mels=mels)
    contract(encoder, TONE)
    quiet, loud = ((TONE[0] * factor, TONE[1]) for factor in (0.3, 1.0))
    rows = [encoder(encoder.transform(False)(clip)[None]) for clip in (quiet, loud)]
    noise = encoder(encoder.transform(False)((np.random.default_rng(0).normal(size=40000) * 0.1, 16000))[None])
    assert (rows[0] - rows[1]).norm() < 0.2 * (rows[0] - noise).norm()  # loudness does not matter, the sound does


def test_pictures_of_another_size_and_crops() -> None:
    encoder = TimmImageEncoder(6, "test_resnet", image_size=64, crops=[Crop(2, 64, (0.5, 1.0))])
    assert encoder.transform(False)(PICTURE).shape == (3, 64, 64) and encoder.settings["image_size"] == 64
    assert TimmImageEncoder(6, "test_vit", image_size=64).features(torch.zeros(1, 3, 64, 64)).shape == (1, 64)
    with pytest.raises(ConfigError, match="64 pixels, not crops of"):
        TimmImageEncoder(6, "test_resnet", image_size=64, crops=[Crop(2, 32)])


def test_training_crops_and_evaluation_does_not() -> None:
    encoder = TimmImageEncoder(6, "test_resnet", crop_scale=(0.2, 0.4))
    one, other = encoder.transform(True)(PICTURE), encoder.transform(True)(PICTURE)
    assert not torch.equal(one, other)
    assert torch.equal(encoder.transform(False)(PICTURE), encoder.transform(False)(PICTURE))


REFUSED: dict[str, tuple[Callable[[], Encoder], type[Exception], str]] = {
    "timm name": (lambda: TimmImageEncoder(6, "resnet18x"), ConfigError, "did you mean 'resnet18'"),
    "timm tag": (lambda: TimmImageEncoder(6, "resnet18.nope"), ConfigError, "Invalid pretrained tag"),
    "timm offline": (
        lambda: TimmImageEncoder(6, "resnet18", pretrained=True),
        CheckpointError,
        "path of a weights file",
    ),
    "torchvision name": (lambda: TorchvisionImageEncoder(6, "resnet18x"), ConfigError, "did you mean 'resnet18'"),
    "no linear layer": (lambda: TorchvisionImageEncoder(6, "squeezenet1_0"), ConfigError, "one linear layer"),
    "auxiliary outputs": (lambda: TorchvisionImageEncoder(6, "googlenet"), ConfigError, "one linear layer"),
    "no file": (lambda: TimmImageEncoder(6, "resnet18", pretrained="nope.pth"), CheckpointError, "no such weights"),
    "mel name": (lambda: MelTowerAudioEncoder(6, "resnet18x"), ConfigError, "did you mean 'resnet18'"),
}


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use(name: str) -> None:
    make, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_weights_of_a_file_fit_another_size_as_timms_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("test_vit", pretrained=False)
    save_file(dict(whole.state_dict()), tmp_path / "vit.safetensors")
    encoder = TimmImageEncoder(6, "test_vit", pretrained=str(tmp_path / "vit.safetensors"), image_size=96)
    overlay = {"file": str(tmp_path / "vit.safetensors")}
    theirs = timm.create_model("test_vit", pretrained=True, num_classes=0, img_size=96, pretrained_cfg_overlay=overlay)
    ours = encoder.backbone.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    sound = MelTowerAudioEncoder(6, "test_vit", pretrained=str(tmp_path / "vit.safetensors"), seconds=1.6, mels=64)
    assert sound.features(sound.empty(2)).shape == (2, sound.feature_dim)


def test_torchvisions_cache_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = Path(models.ResNet18_Weights.DEFAULT.url).name
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "hub" / "checkpoints" / name)
    with pytest.raises(CheckpointError, match="torchvision's weights cannot be had"):
        TorchvisionImageEncoder(6, "resnet18", pretrained=True)
    assert not (tmp_path / "ran").exists()


class Evil:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
