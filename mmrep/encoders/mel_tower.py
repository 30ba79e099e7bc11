"""Audio encoder that looks at a spectrogram as at a picture: a log-mel front and an image network of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmrep.encoders.audio import MelEncoder
from mmrep.encoders.backbones import create_timm, image_size_options, output_width
from mmrep.encoders.layers import tower_layers


class MelTowerAudioEncoder(MelEncoder):
    """Log-mel spectrogram, made on the device, and an image network of timm over it, as over a picture with one channel.

    A network with BatchNorm mixes the samples of a rank's batch in training, unless it is frozen.

    Args:
        embed_dim: Width of the embedding space.
        architecture: A name that ``timm.list_models()`` gives. One whose input size is fixed (ViT) is built for the
            spectrogram's: ``mels`` and 50 frames a second must then be multiples of its patches.
        pretrained: True for timm's own weights, from its cache or the network; or the path of a ``.safetensors`` or
            weights-only ``.pth`` file with timm's names. Those of pictures are summed over the colours. Only read when a run
            begins.
        seconds: Clips are cut or padded to this length.
        rate: In Hz; clips of another rate are resampled.
        mels: Bands of the spectrogram.
        augment: Whether training varies speed, loudness and start, and masks bands and stretches of the spectrogram.
        random_window: Whether training takes a random window of a clip that is longer than ``seconds``, and not its start.
        **head: ``projection``, ``batch_norm``, ``head_width``, ``lora``, ``views``: see `mmrep.encoders.base.Encoder`.

    Raises:
        ConfigError: On an unknown architecture.
        CheckpointError: If the weights cannot be had, or do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        architecture: str = "resnet18",
        pretrained: bool | str = False,
        seconds: float = 4.0,
        rate: int = 16000,
        mels: int = 64,
        augment: bool = True,
        random_window: bool = False,
        **head: Any,
    ) -> None:
        frames = round(seconds * rate) // (rate // 50)
        sizes = image_size_options(architecture, (mels, frames))
        tower = create_timm(architecture, pretrained, in_chans=1, **sizes)
        super().__init__(
            embed_dim,
            output_width(tower),
            {"architecture": architecture},
            seconds=seconds,
            rate=rate,
            mels=mels,
            augment=augment,
            random_window=random_window,
            **head,
        )
        self.frames, self.tower = frames, tower

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower(self.spectrogram(inputs)[:, None, :, : self.frames])
        return features

    def layers(self) -> list[list[nn.Parameter]]:
        return tower_layers(self.tower)
