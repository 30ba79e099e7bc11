"""Encoders, one file a modality, on one interface: see `mmrep.encoders.base.Encoder`."""

from mmrep.encoders.audio import MelAudioEncoder
from mmrep.encoders.base import Encoder
from mmrep.encoders.features import FeaturesEncoder
from mmrep.encoders.image import ConvImageEncoder, OpenClipImageEncoder
from mmrep.encoders.text import NgramTextEncoder, OpenClipTextEncoder

__all__ = [
    "ConvImageEncoder",
    "Encoder",
    "FeaturesEncoder",
    "MelAudioEncoder",
    "NgramTextEncoder",
    "OpenClipImageEncoder",
    "OpenClipTextEncoder",
]
