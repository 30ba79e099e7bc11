"""Every encoder keeps the contract: transforms that travel, empty inputs, features, a head, settings that rebuild it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

from mmrep.encoders import (
    ConvImageEncoder,
    Encoder,
    FeaturesEncoder,
    MelAudioEncoder,
    NgramTextEncoder,
    OpenClipImageEncoder,
    OpenClipTextEncoder,
)
from mmrep.encoders.audio import rate_ratio
from mmrep.errors import ConfigError, DataError

PICTURE = Image.fromarray((np.random.default_rng(0).random((40, 30, 3)) * 255).astype(np.uint8))
TONE = (np.sin(np.arange(9000) / 7).astype(np.float32) * 0.5, 22050)
TINY = "mmrep-test-tiny"


@pytest.fixture(scope="module", autouse=True)
def tiny_open_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small architecture in open_clip's registry, by its own door."""
    import open_clip

    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / f"{TINY}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


ENCODERS: dict[str, tuple[Callable[[], Encoder], Any]] = {
    "conv": (lambda: ConvImageEncoder(6, image_size=16, width=8), PICTURE),
    "ngram": (lambda: NgramTextEncoder(6, width=16, buckets=99, length=40), "a grinning face"),
    "mel": (lambda: MelAudioEncoder(6, seconds=0.5, width=16), TONE),
    "features": (lambda: FeaturesEncoder(6, size=4, width=8), np.array([1.0, np.nan, 3.0, -1.0])),
    "open_clip image": (lambda: OpenClipImageEncoder(6, TINY), PICTURE),
    "open_clip text": (lambda: OpenClipTextEncoder(6, TINY), "a grinning face"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_contract(name: str) -> None:
    make, raw = ENCODERS[name]
    encoder = make().eval()
    for train in (True, False):
        transform = pickle.loads(pickle.dumps(encoder.transform(train)))
        row = transform(raw)
        blank = encoder.empty(3)
        assert isinstance(blank, torch.Tensor)
        assert blank.shape == (3, *row.shape) and blank.dtype == row.dtype and not blank.any()
    inputs = torch.stack([row, blank[0]])
    assert encoder.features(inputs).shape == (2, encoder.feature_dim)
    rows = encoder(inputs)
    assert rows.shape == (2, 6) and bool(rows.isfinite().all())
    assert not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize("name", ENCODERS)
def test_settings_rebuild_it_with_its_preprocessing(name: str) -> None:
    make, raw = ENCODERS[name]
    encoder = make().eval()
    again = type(encoder)(encoder.embed_dim, **json.loads(json.dumps(encoder.settings))).eval()
    again.load_state_dict(encoder.state_dict())
    one, other = (each(each.transform(False)(raw)[None]) for each in (encoder, again))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    make, raw = ENCODERS[name]
    encoder = make().eval()
    row = encoder.transform(False)(raw)
    beside = encoder(torch.cat([row[None], encoder.empty(2)]))[0]  # type: ignore[list-item]  # no encoder here is multi-crop
    assert torch.allclose(encoder(row[None])[0], beside, atol=1e-6)


def test_open_clip_towers_give_open_clips_features() -> None:
    """Same weights, same picture and text: equal to open_clip's own preprocessing, tokenizer and model."""
    import open_clip

    image, text = OpenClipImageEncoder(6, TINY).eval(), OpenClipTextEncoder(6, TINY).eval()
    model, _, preprocess = open_clip.create_model_and_transforms(TINY, pretrained=None, force_custom_text=True)
    model.visual.load_state_dict(image.tower.state_dict())
    model.text.load_state_dict(text.tower.state_dict())
    model.eval()
    with torch.no_grad():
        ours = image.features(image.transform(False)(PICTURE)[None])
        assert torch.equal(ours, model.encode_image(preprocess(PICTURE)[None]))
        tokens = open_clip.get_tokenizer(TINY)(["a grinning face"])
        assert torch.equal(text.transform(False)("a grinning face")[None], tokens)
        assert torch.equal(text.features(tokens), model.encode_text(tokens))


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'ViT-B-32'"):
        OpenClipImageEncoder(6, "ViT-B-32x")


def test_ngrams_know_any_script_and_ignore_case_and_order() -> None:
    transform = NgramTextEncoder(4, buckets=4096, length=64).transform(False)
    assert torch.equal(transform("Red Apple"), transform("red apple"))
    encoder = NgramTextEncoder(4, buckets=4096, length=64)
    assert torch.allclose(encoder(transform("red apple")[None]), encoder(transform("apple red")[None]), atol=1e-6)
    words = ["grün", "зелёный", "緑", "أخضر", ""]
    assert len({tuple(transform(word).tolist()) for word in words}) == len(words)
    assert transform("x" * 999).shape == (64,)


def test_audio_is_resampled_and_cut_or_padded() -> None:
    transform = MelAudioEncoder(4, seconds=0.5).transform(False)
    clip = transform(TONE)
    assert clip.shape == (8000,) and int(clip.abs().max()) > 15000
    assert not clip[round(9000 * 16000 / 22050) + 50 :].any()
    assert transform((np.zeros(99999, np.float32), 16000)).shape == (8000,)
    assert not transform((np.zeros(0, np.float32), 16000)).any()


@pytest.mark.parametrize("new", [8000, 16000, 48000])
def test_the_filter_for_any_rate_is_small_and_its_ratio_right(new: int) -> None:
    for old in (*range(1000, 50_000, 101), 44101, 48001, 96001, 192001, 767_999, new - 1, new + 1):
        numerator, denominator = rate_ratio(old, new)
        assert numerator * denominator <= 1_000_000
        assert numerator / denominator == pytest.approx(old / new, rel=1e-3)
    for old in (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 96000, 192_000):
        numerator, denominator = rate_ratio(old, new)
        assert numerator * new == denominator * old  # exact


@pytest.mark.parametrize("rate", [4001, 11127, 22254, 44101])
def test_sounds_of_odd_rates_keep_their_pitch(rate: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) * 0.5
    clip = MelAudioEncoder(4, seconds=1.0).transform(False)((tone, rate)).float()
    assert clip.shape == (16000,) and int(torch.fft.rfft(clip).abs().argmax()) == 440


@pytest.mark.parametrize("augment", [False, True])
def test_an_empty_sound_of_any_rate_is_silence(augment: bool) -> None:
    transform = MelAudioEncoder(4, augment=augment, random_window=augment).transform(True)
    for rate in (16000, 22050):
        assert not transform((np.zeros(0, np.float32), rate)).any()


def test_of_a_long_sound_only_a_part_is_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 50_000).astype(np.float32)
    whole = torchaudio.functional.resample(torch.from_numpy(noise), 8000, 16000)
    resampled: list[int] = []
    real = torchaudio.functional.resample

    def counted(samples: torch.Tensor, old: int, new: int) -> torch.Tensor:
        resampled.append(len(samples))
        result: torch.Tensor = real(samples, old, new)
        return result

    monkeypatch.setattr("mmrep.encoders.audio.AF.resample", counted)
    clip = MelAudioEncoder(4, seconds=0.25).transform(False)((noise, 8000))
    assert int((clip - (whole[:4000] * 32767).to(torch.int16)).abs().max()) <= 1
    window = MelAudioEncoder(4, seconds=0.25, augment=False, random_window=True).transform(True)
    ramp = np.linspace(0, 1, 50_000, dtype=np.float32)
    starts = [int(window((ramp, 8000))[100]) / 32767 for _ in range(60)]
    assert min(starts) < 0.15 and max(starts) > 0.8 and 0.35 < np.mean(starts) < 0.6
    assert max(resampled) <= 4000


def test_loudness_does_not_matter_to_the_mel_encoder() -> None:
    encoder = MelAudioEncoder(4, seconds=0.25).eval()
    transform = encoder.transform(False)
    quiet = encoder(transform((TONE[0] * 0.2, 22050))[None])
    assert torch.allclose(encoder(transform(TONE)[None]), quiet, atol=0.05)


def test_missing_values_are_told_from_zeros() -> None:
    encoder = FeaturesEncoder(4, size=2).eval()
    zero, missing = encoder(torch.zeros(1, 2)), encoder(torch.tensor([[0.0, torch.nan]]))
    assert bool(missing.isfinite().all()) and not torch.allclose(zero, missing)
    with pytest.raises(DataError, match="3 numbers where 2"):
        encoder.transform(False)(np.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_spectrograms_are_made_in_fp32_and_come_in_the_models_type(dtype: torch.dtype) -> None:
    """As ``trainer.precision bf16-true`` and ``64-true`` convert a module."""
    torch.manual_seed(0)
    encoder = MelAudioEncoder(8, seconds=0.2, width=8).eval()
    waves = torch.randint(-9000, 9000, (3, encoder.length), dtype=torch.int16)
    expected, spectrogram = encoder(waves), encoder.spectrogram(waves)
    encoder.to(dtype)
    assert {buffer.dtype for buffer in encoder.mel.buffers()} == {torch.float32}
    assert torch.equal(encoder.spectrogram(waves), spectrogram.to(dtype))
    found = encoder(waves)
    assert found.dtype == dtype and torch.allclose(found.float(), expected, rtol=0.05, atol=0.02)
