"""Audio encoders: a small one over log-mel spectrograms that trains on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

from mmrep.data.decode import Waveform
from mmrep.encoders.base import Encoder


@dataclass(frozen=True)
class FixedWaveform:
    """A waveform of any rate and length to int16 ``[length]``: resampled, cut at the end or padded with silence.

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
        if rate != self.rate:
            samples = AF.resample(samples, rate, self.rate)
        if self.augment and len(samples):
            samples = self._vary(samples)
        if self.window and len(samples) > self.length:
            start = int(torch.randint(0, len(samples) - self.length + 1, (1,)))
            samples = samples[start:]
        fitted = F.pad(samples[: self.length], (0, max(0, self.length - len(samples))))
        return (fitted.clamp(-1, 1) * 32767).to(torch.int16)

    def _vary(self, samples: Tensor) -> Tensor:
        speed, loudness = float(torch.empty(1).uniform_(0.85, 1.18)), float(torch.empty(1).uniform_(0.5, 1.2))
        length = max(1, round(len(samples) / speed))
        changed = F.interpolate(samples[None, None], size=length, mode="linear")[0, 0] * loudness
        return F.pad(changed, (int(torch.randint(0, self.rate // 8, (1,))), 0))


class MelAudioEncoder(Encoder):
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

    kind = "audio"

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
        settings = {"seconds": seconds, "rate": rate, "mels": mels, "width": width}
        settings |= {"augment": augment, "random_window": random_window}
        super().__init__(embed_dim, 2 * width, settings, **head)
        self.rate, self.length = rate, round(seconds * rate)
        self.augment, self.random_window = augment, random_window
        self.mel = MelSpectrogram(rate, n_fft=512, win_length=rate // 40, hop_length=rate // 50, n_mels=mels)
        layers: list[nn.Module] = []
        for before in (mels, width, width):
            layers += [nn.Conv1d(before, width, 5, stride=2, padding=2), nn.GroupNorm(8, width), nn.GELU()]
        self.backbone = nn.Sequential(*layers)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return FixedWaveform(self.rate, self.length, train and self.augment, train and self.random_window)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.length, dtype=torch.int16)

    def features(self, inputs: Tensor) -> Tensor:
        # Power spectra overflow half precision.
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            waveform = inputs.float() / 32768
            mel = (self.mel(waveform / (waveform.std(dim=1, keepdim=True) + 1e-3)) + 1e-4).log()
            mel = (mel - mel.mean(dim=(1, 2), keepdim=True)) / (mel.std(dim=(1, 2), keepdim=True) + 1e-5)
            if self.training and self.augment:
                mel = AF.mask_along_axis_iid(mel[:, None], mel.shape[1] // 5, 0.0, axis=2)[:, 0]
                mel = AF.mask_along_axis_iid(mel[:, None], mel.shape[2] // 8, 0.0, axis=3)[:, 0]
        over_time = self.backbone(mel)
        return torch.cat([over_time.mean(dim=2), over_time.amax(dim=2)], dim=1)
