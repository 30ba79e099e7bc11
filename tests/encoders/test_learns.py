"""Each encoder learns what only its own modality tells, on items it has not seen; with shuffled pairs it learns nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmrep.encoders import (
    Encoder,
    FeaturesEncoder,
    HFAudioEncoder,
    HFTextEncoder,
    MelTowerAudioEncoder,
    SeriesEncoder,
    TabularEncoder,
    TimmImageEncoder,
    TorchvisionImageEncoder,
)
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from tests.encoders.sources import WORDS, write_audio_source, write_text_source

TRAIN, TEST, BATCH, EMBED = 192, 24, 24, 16
RATE = 16000
Sources = Callable[[str], str]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("learns")
    write_text_source(folder / "bert", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for kind in ("wav2vec2", "audio-spectrogram-transformer", "whisper"):
        write_audio_source(folder / kind, kind)
    return lambda kind: str(folder / kind)


def series(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two channels, each a wave whose frequency is a number of ``z``; noise, an offset, and a gap."""
    times = np.arange(100) / 100
    waves = [np.sin(2 * np.pi * ((2 + 9 * f) * times + rng.random())) for f in z]
    made = np.stack(waves) + rng.normal(scale=0.1, size=(2, 100)) + rng.normal(size=(2, 1)) * 3
    start = rng.integers(0, 90)
    made[rng.integers(0, 2), start : start + 10] = np.nan
    return made


def table(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Eight columns of very different scales, a quarter of them not measured; missingness alone says nothing."""
    row = np.concatenate([z, 1 - z, z * z[::-1], z**2]) * 10.0 ** np.arange(-3, 5) + 10.0 ** np.arange(-3, 5)
    return np.where(rng.random(8) < 0.25, np.nan, row)


def vector(z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.tanh(np.random.default_rng(1).normal(size=(12, 2)) @ z) + rng.normal(scale=0.02, size=12)


def picture(z: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A square at a place; its colour says nothing."""
    pixels = rng.integers(0, 60, (32, 32, 3))
    x, y = (2 + z * 20).astype(int)
    pixels[y : y + 8, x : x + 8] = rng.integers(120, 256, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def sound(z: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """One tone after another; loudness and phase say nothing."""
    times = np.arange(RATE // 2) / RATE
    tones = [np.sin(2 * np.pi * (300 * 8**f * times + rng.random())) for f in z]
    samples = np.concatenate(tones) * rng.uniform(0.2, 0.9) + rng.normal(scale=0.01, size=RATE)
    return samples.astype(np.float32), RATE


def chord(z: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Two tones at once, a low and a high one."""
    times = np.arange(RATE // 2) / RATE
    pitches = np.array([200, 1200]) * 4**z
    samples = np.sin(2 * np.pi * (pitches[:, None] * times + rng.random((2, 1)))).sum(axis=0)
    return (samples * rng.uniform(0.1, 0.45)).astype(np.float32), RATE


def colour(z: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Red and green say it; blue and the pattern do not."""
    pixels = np.concatenate([np.broadcast_to(40 + 170 * z, (32, 32, 2)), rng.integers(0, 255, (32, 32, 1))], axis=2)
    return Image.fromarray((pixels + rng.integers(-20, 21, (32, 32, 1))).clip(0, 255).astype(np.uint8))


def words(z: np.ndarray, rng: np.random.Generator) -> str:
    """Two words of eight for the two numbers, among words that say nothing."""
    first, second = (z * 7.99).astype(int)
    idle = [WORDS[16]] * int(rng.integers(0, 3))
    return " ".join([*idle, WORDS[first], WORDS[8 + second]])


CASES: dict[str, tuple[Callable[[Sources], Encoder], Callable[..., Any], int, float]] = {
    "series": (lambda _: SeriesEncoder(EMBED, 2, 100, width=16, stages=3), series, 120, 3e-3),
    "tabular": (lambda _: tabular(), table, 150, 5e-3),
    "features": (lambda _: FeaturesEncoder(EMBED, size=12, width=32), vector, 120, 5e-3),
    "vectors": (lambda _: FeaturesEncoder(EMBED, size=12, layers=0, head_width=64), vector, 120, 5e-3),
    "timm": (lambda _: TimmImageEncoder(EMBED, "test_vit", image_size=32), picture, 180, 3e-3),
    "timm bn": (lambda _: TimmImageEncoder(EMBED, "test_resnet", image_size=32), picture, 120, 3e-3),
    "torchvision": (lambda _: small_torchvision(), colour, 60, 3e-3),
    "text": (lambda s: HFTextEncoder(EMBED, s("bert"), length=8), words, 120, 1e-2),
    "waveform": (lambda s: HFAudioEncoder(EMBED, s("wav2vec2"), seconds=0.5), chord, 150, 1e-2),
    "ast": (lambda s: HFAudioEncoder(EMBED, s("audio-spectrogram-transformer"), seconds=0.5), chord, 120, 5e-3),
    "whisper": (lambda s: HFAudioEncoder(EMBED, s("whisper"), seconds=1.0), sound, 150, 5e-3),
    "mel tower": (
        lambda _: MelTowerAudioEncoder(EMBED, "test_resnet", seconds=0.5, mels=32, augment=False),
        chord,
        60,
        3e-3,
    ),
}


def tabular() -> TabularEncoder:
    from mmrep.encoders.tabular import column_statistics

    rng = np.random.default_rng(5)
    rows = np.stack([table(rng.random(2), rng) for _ in range(100)])
    return TabularEncoder(EMBED, size=8, width=32, **column_statistics(rows))


def small_torchvision() -> TorchvisionImageEncoder:
    encoder = TorchvisionImageEncoder(EMBED, "resnet18")
    settings = encoder.settings["preprocessing"] | {"size": 32, "resize": 32}
    return TorchvisionImageEncoder(EMBED, "resnet18", preprocessing=settings)


def recall(make: Callable[[], Encoder], draw: Callable[..., Any], steps: int, lr: float, shuffled: bool) -> float:
    """Train the encoder beside one that sees the two numbers, and find the right numbers of 24 new items."""
    rng = np.random.default_rng(0)
    numbers = rng.random((TRAIN + TEST, 2))
    numbers[TRAIN:] = (np.stack(np.meshgrid(range(6), range(4)), axis=-1).reshape(-1, 2) + 0.5) / [6, 4]
    torch.manual_seed(0)
    encoder, other = make(), FeaturesEncoder(EMBED, size=2, width=64)
    model = MultimodalModel({"item": encoder, "numbers": other}, PairwiseCLIPLoss())
    transform = encoder.transform(False)
    items = torch.stack([transform(draw(z, rng)) for z in numbers])
    partners = torch.from_numpy(numbers * 4 - 2).float()
    if shuffled:
        partners[:TRAIN] = partners[:TRAIN][torch.randperm(TRAIN)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randperm(TRAIN)[:BATCH]
        optimizer.zero_grad()
        model.loss(model({"item": items[chosen], "numbers": partners[chosen]})).loss.backward()
        optimizer.step()
        schedule.step()
    return found(model.eval(), {"item": items[TRAIN:], "numbers": partners[TRAIN:]})


@torch.no_grad()
def found(model: MultimodalModel, inputs: dict[str, Tensor]) -> float:
    rows = model(inputs)
    scores = model.score(target="numbers", candidates=rows["numbers"], given={"item": rows["item"]})
    return float((scores.argmax(dim=1) == torch.arange(TEST)).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_learns(name: str, sources: Sources, record_property: Callable[[str, object], None]) -> None:
    make, draw, steps, lr = CASES[name]
    true, shuffled = (recall(lambda: make(sources), draw, steps, lr, mixed) for mixed in (False, True))
    print(f"\n{name}: {true:.2f}, shuffled {shuffled:.2f}")
    assert true >= 0.4 and shuffled <= 0.25  # chance is 0.04
