"""Encoders, one file a modality, on one interface: see `mmrep.encoders.base.Encoder`. docs/encoders.md has a table."""

from mmrep.encoders.audio import MelAudioEncoder
from mmrep.encoders.base import Encoder
from mmrep.encoders.features import FeaturesEncoder
from mmrep.encoders.hugging_face import HFAudioEncoder, HFTextEncoder
from mmrep.encoders.image import ConvImageEncoder, OpenClipImageEncoder
from mmrep.encoders.mel_tower import MelTowerAudioEncoder
from mmrep.encoders.series import SeriesEncoder
from mmrep.encoders.tabular import TabularEncoder
from mmrep.encoders.text import NgramTextEncoder, OpenClipTextEncoder
from mmrep.encoders.vision import TimmImageEncoder, TorchvisionImageEncoder

__all__ = [
    "ConvImageEncoder",
    "Encoder",
    "FeaturesEncoder",
    "HFAudioEncoder",
    "HFTextEncoder",
    "MelAudioEncoder",
    "MelTowerAudioEncoder",
    "NgramTextEncoder",
    "OpenClipImageEncoder",
    "OpenClipTextEncoder",
    "SeriesEncoder",
    "TabularEncoder",
    "TimmImageEncoder",
    "TorchvisionImageEncoder",
]
