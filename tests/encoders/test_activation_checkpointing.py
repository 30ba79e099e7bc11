"""Blocks that are computed again: the same gradients, fewer activations, the same names; and what cannot be."""

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
    HFAudioEncoder,
    HFTextEncoder,
    MelAudioEncoder,
    NgramTextEncoder,
    OpenClipImageEncoder,
    OpenClipTextEncoder,
    SeriesEncoder,
    TabularEncoder,
    TimmImageEncoder,
    TorchvisionImageEncoder,
)
from mmrep.encoders.activation_checkpointing import checkpoint_activations
from mmrep.errors import ConfigError
from mmrep.modules import PairwiseCLIP
from mmrep.modules.gradient_caching import GradientCaching
from tests.encoders.sources import write_audio_source, write_text_source
from tests.interop.open_clip_models import NATIVE
from tests.memory import peak_allocated

Make = Callable[[Path], Encoder]
DROPPING = {**NATIVE, "vision_cfg": {**NATIVE["vision_cfg"], "patch_dropout": 0.5}}
BLOCKS: dict[str, tuple[Make, int]] = {
    "open_clip image": (lambda _: OpenClipImageEncoder(8, DROPPING), 2),
    "open_clip text": (lambda _: OpenClipTextEncoder(8, NATIVE), 2),
    "open_clip image, lora": (lambda _: OpenClipImageEncoder(8, NATIVE, lora={"r": 2}), 2),
    "timm vit": (lambda _: TimmImageEncoder(8, "test_vit"), 6),
    "timm convnext": (lambda _: TimmImageEncoder(8, "test_convnext", image_size=64), 9),
    "series": (lambda _: SeriesEncoder(8, channels=2, length=64, width=8, stages=2), 3),
    "bert": (lambda folder: HFTextEncoder(8, str(write_text_source(folder))), 1),
    "bert, lora": (lambda folder: HFTextEncoder(8, str(write_text_source(folder)), lora={"r": 2, "dropout": 0.2}), 1),
    "gpt2": (lambda folder: HFTextEncoder(8, str(write_text_source(folder, "gpt2")), pooling="last"), 1),
    "wav2vec2": (lambda folder: HFAudioEncoder(8, str(write_audio_source(folder, "wav2vec2")), seconds=0.5), 1),
}


def inputs_of(encoder: Encoder, n: int) -> Tensor:
    """``n`` inputs that differ, of the encoder's shape and type."""
    empty = encoder.empty(n)
    if empty.is_floating_point():
        return torch.randn(empty.shape)
    high = 2 if isinstance(encoder, HFTextEncoder) else 120
    numbers = torch.randint(0, high, empty.shape, dtype=empty.dtype)
    if isinstance(encoder, HFTextEncoder):
        numbers[:, 1] = 1
    return numbers


def gradients(encoder: Encoder, inputs: Tensor, size: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    encoder.zero_grad()
    rows = encoder(inputs) if size is None else GradientCaching(size)(encoder, inputs)
    (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
    return {name: weight.grad.clone() for name, weight in encoder.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_and_names_are_the_same(name: str, tmp_path: Path) -> None:
    """Also with adapters, in copies, in parts, and with the dropout and dropped patches of training."""
    make, blocks = BLOCKS[name]
    torch.manual_seed(0)
    encoder = make(tmp_path)
    encoder.adapt()
    inputs, names = inputs_of(encoder, 3), list(encoder.state_dict())
    expected, in_parts = gradients(encoder, inputs), gradients(encoder, inputs, 2)
    with torch.no_grad():
        rows = encoder.eval()(inputs)
    encoder.train()
    assert checkpoint_activations(encoder) == blocks
    assert list(encoder.state_dict()) == names
    for one in (encoder, copy.deepcopy(encoder)):
        for wanted, found in ((expected, gradients(one, inputs)), (in_parts, gradients(one, inputs, 2))):
            assert found.keys() == wanted.keys()
            for key, gradient in wanted.items():
                assert torch.allclose(found[key], gradient, rtol=1e-5, atol=1e-7), key
    with torch.no_grad():
        assert torch.equal(encoder.eval()(inputs), rows)


def test_blocks_of_torchvision() -> None:
    """Two, two, six and two of Swin's, its patch embedding, and what merges patches between stages."""
    encoder = TorchvisionImageEncoder(8, "swin_t")
    inputs = inputs_of(encoder, 1)
    expected = gradients(encoder, inputs)
    assert checkpoint_activations(encoder) == 12 + 1 + 3
    for name, gradient in gradients(encoder, inputs).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("name", ["open_clip image", "timm vit", "series", "bert", "wav2vec2"])
def test_blocks_keep_their_inputs_alone(name: str, tmp_path: Path) -> None:
    encoder = BLOCKS[name][0](tmp_path)
    inputs = inputs_of(encoder, 16)

    def kept() -> int:
        """Bytes that a forward pass leaves behind."""
        found = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal found
            found += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(inputs)
        return found

    whole = kept()
    checkpoint_activations(encoder)
    assert kept() < 0.6 * whole


def test_memory_falls_with_the_blocks() -> None:
    deep = {**NATIVE, "vision_cfg": {**NATIVE["vision_cfg"], "layers": 12}}
    encoder = OpenClipImageEncoder(8, deep)
    inputs = inputs_of(encoder, 64)
    whole = peak_allocated(lambda: encoder(inputs).sum().backward())
    checkpoint_activations(encoder)
    assert peak_allocated(lambda: encoder(inputs).sum().backward()) < 0.35 * whole


def test_in_parts_the_blocks_run_three_times() -> None:
    encoder = SeriesEncoder(8, channels=2, length=64, width=8, stages=2)
    inputs, calls = torch.randn(4, 2, 64), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    encoder.backbone[1].convolutions[0].register_forward_hook(count)  # type: ignore[union-attr,index]  # of a Block1d
    for size, expected in ((None, 1), (2, 4)):
        calls = 0
        gradients(encoder, inputs, size)
        assert calls == expected
    checkpoint_activations(encoder)
    for size, expected in ((None, 2), (2, 6)):
        calls = 0
        gradients(encoder, inputs, size)
        assert calls == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvImageEncoder(8, 16, 8),
        lambda: NgramTextEncoder(8, width=8, buckets=9),
        lambda: MelAudioEncoder(8, seconds=0.2, width=8),
        lambda: FeaturesEncoder(8, size=4),
        lambda: TabularEncoder(8, size=4),
    ],
)
def test_encoders_of_plain_layers_have_no_blocks(make: Callable[[], Encoder]) -> None:
    assert checkpoint_activations(make()) == 0


def test_a_module_needs_one_encoder_with_blocks() -> None:
    plain: dict[str, Any] = {"a": lambda d: FeaturesEncoder(d, size=4), "b": lambda d: ConvImageEncoder(d, 16, 8)}
    series: dict[str, Any] = {"c": lambda d: SeriesEncoder(d, channels=2, length=64, width=8, stages=2)}
    PairwiseCLIP({**plain, **series}, activation_checkpointing=True)  # one of three has them
    message = r"no encoder has blocks of layers: a \(FeaturesEncoder\), b \(ConvImageEncoder\); set micro_batch_size"
    with pytest.raises(ConfigError, match=message):
        PairwiseCLIP(plain, activation_checkpointing=True)


def test_statistics_of_batches_are_refused_unless_they_are_frozen() -> None:
    encoders: dict[str, Any] = {"image": TorchvisionImageEncoder, "labs": lambda d: FeaturesEncoder(d, size=4)}
    with pytest.raises(
        ConfigError, match=r"BatchNorm2d would count each batch twice.*\[backbone\.layer1\.0\.bn1\]; freeze"
    ):
        PairwiseCLIP(encoders, activation_checkpointing=True)
    assert PairwiseCLIP(encoders, activation_checkpointing=True, freeze=["image.backbone.*bn*", "image.*downsample.1"])


def test_statistics_inside_a_network_of_transformers_are_refused_too() -> None:
    class Network(torch.nn.Module):
        supports_gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(4)

        def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
            raise AssertionError("it must be refused before")

    encoder = FeaturesEncoder(8, size=4)
    encoder.network = Network()
    with pytest.raises(ConfigError, match=r"BatchNorm1d would count each batch twice.*\[network\.norm\]; freeze"):
        checkpoint_activations(encoder)


def test_statistics_outside_the_layers_that_are_computed_again_are_not_refused(tmp_path: Path) -> None:
    source = write_audio_source(tmp_path, "hubert", conv_pos_batch_norm=True)
    encoder = HFAudioEncoder(8, str(source), seconds=0.5, projection=True).train()
    assert checkpoint_activations(encoder) == 1
    encoder(inputs_of(encoder, 4)).sum().backward()
    counted = {name: int(number) for name, number in encoder.named_buffers() if name.endswith("num_batches_tracked")}
    assert len(counted) == 1 and set(counted.values()) == {1}
