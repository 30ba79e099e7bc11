"""Audio encoders: a small one over log-mel spectrograms that trains on a CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mmrep.data.decode import Waveform
from mmrep.encoders.base import Encoder
from mmrep.encoders.float32 import Float32Buffers

MAX_FILTER = 1_000_000
"""Of the two rates' reduced terms, multiplied: about how many weights torchaudio's filter has."""


@dataclass(frozen=True)
class FixedWaveform:
    """A waveform of any rate and length to int16 ``[length]``: resampled, cut at the end or padded with silence.

    Rates with hardly a common divisor, as 44,101 and 16,000 Hz, are resampled by the nearest ratio of smaller numbers: see
    `rate_ratio`.

    Args:
        rate: Of the result, in Hz.
        length: Of the result, in samples.
        augment: Whether to vary speed (with pitch, as another voice would), loudness and start at random.
        window: Whether a longer waveform is cut at a random place.
    """

    rate: int
    length: int
    augment: bool
    window: bool = False

    def __call__(self, waveform: Waveform) -> Tensor:
        samples, rate = torch.from_numpy(np.ascontiguousarray(waveform[0], dtype=np.float32)), waveform[1]
        place = float(torch.rand(1)) if self.window else 0.0
        # Resampled whole, a day at 1 kHz is gigabytes. Twice the length has room for another speed, and for the filter's ends.
        enough = math.ceil(2 * self.length * rate / self.rate)
        samples = samples[int(place * max(0, len(samples) - enough)) :][:enough]
        if rate != self.rate and len(samples):
            samples = AF.resample(samples, *rate_ratio(rate, self.rate))
        if self.augment and len(samples):
            samples = self._vary(samples)
        samples = samples[int(place * max(0, len(samples) - self.length + 1)) :]
        fitted = F.pad(samples[: self.length], (0, max(0, self.length - len(samples))))
        return (fitted.clamp(-1, 1) * 32767).to(torch.int16)

    def _vary(self, samples: Tensor) -> Tensor:
        speed, loudness = float(torch.empty(1).uniform_(0.85, 1.18)), float(torch.empty(1).uniform_(0.5, 1.2))
        length = max(1, round(len(samples) / speed))
        changed = F.interpolate(samples[None, None], size=length, mode="linear")[0, 0] * loudness
        return F.pad(changed, (int(torch.randint(0, self.rate // 8, (1,))), 0))


def rate_ratio(old: int, new: int) -> tuple[int, int]:
    """Two rates as the filter takes them: reduced, or where it had too many weights the nearest ratio of smaller numbers.

    That changes pitch and length by less than 0.1 %.
    """
    ratio = Fraction(old, new)
    if ratio.numerator * ratio.denominator > MAX_FILTER:
        ratio = ratio.limit_denominator(max(1, math.isqrt(MAX_FILTER * new // old)))
    return ratio.numerator, ratio.denominator


class LogMel(Float32Buffers, MelSpectrogram):
    """Waveforms int16 ``[B, T]`` to log-mel spectrograms ``[B, mels, frames]`` of mean 0 and deviation 1, 50 frames a second.

    Window and filter bank stay in fp32: in half precision they are other ones.

    Args:
        rate: Of the waveforms, in Hz.
        mels: Bands.
    """

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__(rate, n_fft=512, win_length=rate // 40, hop_length=rate // 50, n_mels=mels)

    # A Fourier transform gains nothing from it, and torchaudio's code does not compile in one piece.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, waveform: Tensor, masked: bool = False) -> Tensor:
        """Without gradients; ``masked`` blanks a random band and a random stretch of each clip."""
        # Power spectra overflow half precision.
        with torch.no_grad(), torch.autocast(waveform.device.type, enabled=False):
            samples = waveform.float() / 32768
            power = super().forward(samples / (samples.std(dim=1, keepdim=True) + 1e-3))
            mel: Tensor = (power + 1e-4).log()
            mel = (mel - mel.mean(dim=(1, 2), keepdim=True)) / (mel.std(dim=(1, 2), keepdim=True) + 1e-5)
            if masked:
                mel = AF.mask_along_axis_iid(mel[:, None], mel.shape[1] // 5, 0.0, axis=2)[:, 0]
                mel = AF.mask_along_axis_iid(mel[:, None], mel.shape[2] // 8, 0.0, axis=3)[:, 0]
        return mel


class MelEncoder(Encoder):
    """Base of the encoders over log-mel spectrograms, which are made on the device.

    Args:
        embed_dim, feature_dim: See `mmrep.encoders.base.Encoder`.
        settings: The subclass's own arguments, those below apart.
        seconds: Clips are cut or padded to this length.
        rate: In Hz; clips of another rate are resampled.
        mels: Bands of the spectrogram.
        augment: Whether training varies speed, loudness and start, and masks bands and stretches of the spectrogram.
        random_window: Whether training takes a random window of a clip that is longer than ``seconds``, and not its start.
        **head: See `mmrep.encoders.base.Encoder`.
    """

    kind = "audio"

    def __init__(
        self,
        embed_dim: int,
        feature_dim: int,
        settings: dict[str, Any],
        *,
        seconds: float,
        rate: int,
        mels: int,
        augment: bool,
        random_window: bool,
        **head: Any,
    ) -> None:
        common = {"seconds": seconds, "rate": rate, "mels": mels, "augment": augment, "random_window": random_window}
        super().__init__(embed_dim, feature_dim, {**common, **settings}, **head)
        self.rate, self.length = rate, round(seconds * rate)
        self.augment, self.random_window = augment, random_window
        self.mel = LogMel(rate, mels)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return FixedWaveform(self.rate, self.length, train and self.augment, train and self.random_window)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.length, dtype=torch.int16)

    def spectrogram(self, inputs: Tensor) -> Tensor:
        """Waveforms ``[B, length]`` to ``[B, mels, frames]`` in the model's float type, masked at random in training."""
        spectrogram: Tensor = self.mel(inputs, self.training and self.augment)
        return spectrogram.to(next(self.parameters()).dtype)


class MelAudioEncoder(MelEncoder):
    """Log-mel spectrogram, made on the device, and convolutions over time; mean and maximum over the clip.

    Args:
        embed_dim: Width of the embedding space.
        seconds: Clips are cut or padded to this length.
        rate: In Hz; clips of another rate are resampled.
        mels: Bands of the spectrogram.
        width: Channels of the convolutions.
        augment: Whether training varies speed, loudness and start, and masks bands and stretches of the spectrogram.
        random_window: Whether training takes a random window of a clip that is longer than ``seconds``, and not its start.
        **head: ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    def __init__(
        self,
        embed_dim: int,
        seconds: float = 1.5,
        rate: int = 16000,
        mels: int = 40,
        width: int = 128,
        augment: bool = True,
        random_window: bool = False,
        **head: Any,
    ) -> None:
        super().__init__(
            embed_dim,
            2 * width,
            {"width": width},
            seconds=seconds,
            rate=rate,
            mels=mels,
            augment=augment,
            random_window=random_window,
            **head,
        )
        layers: list[nn.Module] = []
        for before in (mels, width, width):
            layers += [nn.Conv1d(before, width, 5, stride=2, padding=2), nn.GroupNorm(8, width), nn.GELU()]
        self.backbone = nn.Sequential(*layers)

    def features(self, inputs: Tensor) -> Tensor:
        over_time = self.backbone(self.spectrogram(inputs))
        return torch.cat([over_time.mean(dim=2), over_time.amax(dim=2)], dim=1)
