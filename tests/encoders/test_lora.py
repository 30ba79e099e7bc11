"""Adapters of low rank: nothing changes at first, only they and the head learn, folding them in changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrep.encoders import (
    ConvImageEncoder,
    Encoder,
    FeaturesEncoder,
    HFTextEncoder,
    NgramTextEncoder,
    OpenClipTextEncoder,
    TimmImageEncoder,
)
from mmrep.encoders.lora import merge_adapters
from mmrep.errors import ConfigError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from tests.encoders.sources import PICTURE, TEXTS, write_text_source

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text_source(tmp_path_factory.mktemp("lora") / "bert"))


@pytest.fixture(scope="module", autouse=True)
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    import json

    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "mmrep-lora-tiny.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)


Make = Callable[[str, dict[str, Any] | None], Encoder]
MAKE: dict[str, tuple[Make, Any]] = {
    "bert": (lambda source, lora: HFTextEncoder(6, source, length=8, lora=lora), TEXTS[0]),
    "timm": (lambda _, lora: TimmImageEncoder(6, "test_vit", image_size=32, lora=lora), PICTURE),
    "open_clip": (lambda _, lora: OpenClipTextEncoder(6, "mmrep-lora-tiny", lora=lora), TEXTS[0]),
}
NAMES = {"bert": ["query", "value"], "timm": ["qkv"], "open_clip": ["attn"]}


def pair(make: Make, source: str, lora: dict[str, Any] | None) -> tuple[MultimodalModel, MultimodalModel]:
    """A model without adapters, and with, of the same weights otherwise."""
    models = []
    for option in (None, lora):
        torch.manual_seed(4)
        encoders = {"a": make(source, option), "b": NgramTextEncoder(6, width=8, buckets=50, length=8)}
        models.append(MultimodalModel(encoders, PairwiseCLIPLoss()).eval())
    return models[0], models[1]


def train(model: MultimodalModel, inputs: Tensor, steps: int = 4) -> None:
    """A few steps away from where it is."""
    encoder = model.by_modality["a"]
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        encoder(inputs).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("targets", [None, "named"])
@pytest.mark.parametrize("name", MAKE)
def test_adapters(name: str, targets: str | None, source: str, tmp_path: Path) -> None:
    make, raw = MAKE[name]
    lora = {"r": 2, "alpha": 4} | ({"target_modules": NAMES[name]} if targets else {})
    plain, adapted = pair(make, source, lora)
    encoder = adapted.by_modality["a"]
    inputs = torch.stack([encoder.transform(False)(raw)] * 2)
    assert torch.allclose(plain.by_modality["a"](inputs), encoder(inputs), atol=1e-6)  # B is 0
    trained = {key for key, p in encoder.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in key or key.startswith("head.") for key in trained)
    assert sum(encoder.get_parameter(k).numel() for k in trained) < 0.35 * sum(p.numel() for p in encoder.parameters())
    before = copy.deepcopy(encoder.state_dict())
    train(adapted, inputs)
    after = encoder.state_dict()
    assert {
        key for key in before if not torch.equal(before[key], after[key])
    } == trained  # bit-equal base, all adapters move
    rows = encoder(inputs).detach()
    assert not torch.allclose(rows, plain.by_modality["a"](inputs), atol=1e-2)

    adapted.save_pretrained(tmp_path / "model")
    again = MultimodalModel.from_pretrained(tmp_path / "model")
    assert torch.equal(again.by_modality["a"](inputs), rows) and again.config() == adapted.config()
    with torch.inference_mode():
        encoder(inputs)
    train(adapted, inputs, steps=1)  # inference in between leaves it trainable
    rows = encoder(inputs).detach()

    merge_adapters(adapted)
    assert encoder.state_dict().keys() == plain.by_modality["a"].state_dict().keys() and "lora" not in encoder.settings
    assert torch.allclose(encoder(inputs), rows, atol=1e-4)
    assert all(p.requires_grad for p in encoder.parameters() if p.is_floating_point())
    adapted.save_pretrained(tmp_path / "merged")
    assert torch.equal(MultimodalModel.from_pretrained(tmp_path / "merged").by_modality["a"](inputs), encoder(inputs))


def test_a_hand_computed_adapter() -> None:
    encoder = FeaturesEncoder(2, size=1, width=2, lora={"r": 1, "alpha": 3, "target_modules": ["backbone.3"]})
    model = MultimodalModel({"a": encoder}, PairwiseCLIPLoss(modalities=["a", "b"]))
    layer: Any = encoder.backbone.get_submodule("3")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[1.0], [10.0]]))
    base = layer.base_layer.weight.clone()
    merge_adapters(model)
    change = encoder.backbone.get_submodule("3").weight - base  # type: ignore[operator]  # a linear layer's
    assert torch.allclose(change, 3 * torch.tensor([[1.0, 2.0], [10.0, 20.0]]), atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, "lora has no option 'rank'"),
        ({"r": 0}, "r >= 1"),
        ({"target_modules": ["querry"]}, "did you mean 'query'"),
        ({"target_modules": ["LayerNorm"]}, "target linear layers"),
    ],
)
def test_wrong_use(lora: dict[str, Any], message: str, source: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultimodalModel({"a": HFTextEncoder(6, source, length=8, lora=lora)}, PairwiseCLIPLoss(modalities=["a", "b"]))


def test_nothing_to_adapt() -> None:
    with pytest.raises(ConfigError, match="no linear layers"):
        MultimodalModel({"a": ConvImageEncoder(6, lora={})}, PairwiseCLIPLoss(modalities=["a", "b"]))


def test_peft_is_named_where_it_is_missing(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lora needs peft; pip install 'mmrep\[hf\]'"):
        MultimodalModel({"a": HFTextEncoder(6, source, length=8, lora={})}, PairwiseCLIPLoss(modalities=["a", "b"]))


@pytest.mark.parametrize("lora", [{"r": "8"}, {"r": 2.5}, {"alpha": None}, {"target_modules": "qkv"}])
def test_options_of_the_wrong_type_are_refused(lora: dict[str, Any]) -> None:
    encoder = TimmImageEncoder(6, "test_vit", image_size=32, lora=lora)
    with pytest.raises(ConfigError, match="r is a whole number"):
        encoder.adapt()
