"""The encoders of the comparison: mmrep's small ones, with the spectrograms made once."""

from __future__ import annotations

from typing import Any

import torch
import torchaudio.functional as AF
from torch import Tensor

from benchmarks.compare.settings import Settings
from mmrep.encoders import ConvImageEncoder, Encoder, MelAudioEncoder, NgramTextEncoder


class CachedMelEncoder(MelAudioEncoder):
    """`MelAudioEncoder` that takes what its first lines make: standardised log-mel spectrograms ``[B, mels, T]``."""

    @torch.no_grad()
    def spectrogram(self, waveforms: Tensor) -> Tensor:
        """int16 ``[B, length]`` to fp16 ``[B, mels, T]``, as `MelAudioEncoder.features` does before it masks."""
        waveform = waveforms.float() / 32768
        mel = (self.mel(waveform / (waveform.std(dim=1, keepdim=True) + 1e-3)) + 1e-4).log()
        mel = (mel - mel.mean(dim=(1, 2), keepdim=True)) / (mel.std(dim=(1, 2), keepdim=True) + 1e-5)
        spectrogram: Tensor = mel.half()
        return spectrogram

    def features(self, inputs: Tensor) -> Tensor:
        mel = inputs.float()
        if self.training:
            mel = AF.mask_along_axis_iid(mel[:, None], mel.shape[1] // 5, 0.0, axis=2)[:, 0]
            mel = AF.mask_along_axis_iid(mel[:, None], mel.shape[2] // 8, 0.0, axis=3)[:, 0]
        over_time = self.backbone(mel)
        return torch.cat([over_time.mean(dim=2), over_time.amax(dim=2)], dim=1)


def make_encoders(settings: Settings) -> dict[str, Encoder]:
    """Modality -> encoder, with random weights."""
    s = settings
    text: dict[str, Any] = {"buckets": s.text_buckets, "length": s.text_length, "drop": s.text_drop}
    head: dict[str, Any] = {"batch_norm": s.batch_norm}
    return {
        "image": ConvImageEncoder(s.embed_dim, image_size=s.image_size, width=s.image_width, **head),
        "text": NgramTextEncoder(s.embed_dim, width=s.text_width, **text, **head),
        "audio": CachedMelEncoder(s.embed_dim, seconds=s.seconds, width=s.audio_width, **head),
    }
