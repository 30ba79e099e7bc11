"""The encoders of the comparison: mmrep's small ones, with the spectrograms made once."""

from __future__ import annotations

from typing import Any

import torch
import torchaudio.functional as AF
from torch import Tensor

from benchmarks.compare.settings import Settings
from mmrep.encoders import ConvImageEncoder, Encoder, MelAudioEncoder, NgramTextEncoder


class CachedMelEncoder(MelAudioEncoder):
    """`MelAudioEncoder` that takes the spectrograms ``[B, mels, T]`` that its ``mel`` makes of waveforms, and masks them."""

    @torch.no_grad()
    def spectrogram(self, inputs: Tensor) -> Tensor:
        mel = inputs.float()
        if not self.training:
            return mel
        mel = AF.mask_along_axis_iid(mel[:, None], mel.shape[1] // 5, 0.0, axis=2)[:, 0]
        masked: Tensor = AF.mask_along_axis_iid(mel[:, None], mel.shape[2] // 8, 0.0, axis=3)[:, 0]
        return masked


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
