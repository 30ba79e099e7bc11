"""Every parameter that is trained gets a gradient: DDP waits for each, and an adapter without one adapts nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmrep.encoders import Encoder, HFAudioEncoder, HFTextEncoder, OpenClipImageEncoder, OpenClipTextEncoder
from mmrep.encoders.reach import unreached_parameters
from mmrep.errors import ConfigError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from tests.encoders.sources import (
    AUDIO_NETWORKS,
    PICTURE,
    TEXT_NETWORKS,
    TEXTS,
    TONE,
    write_audio_source,
    write_text_source,
)
from tests.interop.open_clip_models import NATIVE, hf_text, write_open_clip_folder


def assert_all_reached(encoder: Encoder, sample: Any) -> None:
    """Gradients of a batch of a real and an absent sample, after a step that moves adapters off their zeros."""
    MultimodalModel({"x": encoder}, PairwiseCLIPLoss())  # puts adapters in
    inputs = torch.cat([encoder.transform(train=False)(sample)[None], encoder.empty(1)])
    encoder.train()
    for _ in range(2):
        encoder.zero_grad()
        encoder(inputs).square().sum().backward()
        trained = {name: weight for name, weight in encoder.named_parameters() if weight.requires_grad}
        assert len(trained) > 2
        for name, weight in trained.items():
            assert weight.grad is not None and bool(weight.grad.isfinite().all()), name
        with torch.no_grad():
            for weight in trained.values():
                weight -= 0.01 * weight.grad
    changed = {name for name, weight in trained.items() if bool(weight.grad.any())}
    adapters = {name for name in trained if "lora_" in name}
    assert len(adapters - changed) <= len(adapters) // 8, sorted(adapters - changed)  # keys' are next to nothing


@pytest.mark.parametrize("lora", [None, {}])
@pytest.mark.parametrize("kind", TEXT_NETWORKS)
def test_text_networks(kind: str, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    source = str(write_text_source(tmp_path, kind))
    assert_all_reached(HFTextEncoder(6, source, length=8, lora=lora), TEXTS[0])


@pytest.mark.parametrize("lora", [None, {}])
@pytest.mark.parametrize("kind", AUDIO_NETWORKS)
def test_audio_networks(kind: str, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    source = str(write_audio_source(tmp_path, kind))
    assert_all_reached(HFAudioEncoder(6, source, seconds=1.0, lora=lora), TONE)


@pytest.mark.parametrize("lora", [None, {}])
@pytest.mark.parametrize("kind", ["native", "hf"])
def test_open_clips_towers(kind: str, lora: dict[str, Any] | None, tmp_path: Path) -> None:
    folder = write_open_clip_folder(tmp_path / "in", NATIVE if kind == "native" else hf_text(tmp_path / "hf"))
    source = f"local-dir:{folder}"
    assert_all_reached(OpenClipTextEncoder(6, pretrained=source, lora=lora), "a red thing")
    assert_all_reached(OpenClipImageEncoder(6, pretrained=source, lora=lora), PICTURE)


def test_a_parameter_that_nothing_depends_on_is_not_trained(tmp_path: Path) -> None:
    """XLNet's two streams: only one is used without its own objective."""
    from transformers import XLNetConfig, XLNetModel

    source = write_text_source(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (source / name).unlink()
    XLNetModel(XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=16)).save_pretrained(source)
    encoder = HFTextEncoder(6, str(source), length=8)
    frozen = [name for name, weight in encoder.named_parameters() if not weight.requires_grad]
    assert "network.mask_emb" in frozen and not unreached_parameters(encoder)
    assert_all_reached(encoder, TEXTS[0])


def test_a_length_beyond_the_networks_positions_is_refused(tmp_path: Path) -> None:
    source = str(write_text_source(tmp_path, max_position_embeddings=32))
    assert HFTextEncoder(6, source, length=32).length == 32
    with pytest.raises(ConfigError, match=r"cannot take its own input.*a smaller length"):
        HFTextEncoder(6, source, length=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_are_trained_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModel

    source = write_text_source(tmp_path)
    AutoModel.from_pretrained(source).to(dtype).save_pretrained(source)
    encoder = HFTextEncoder(6, str(source), length=8)
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}
    assert_all_reached(encoder, TEXTS[0])
