"""Which modalities a training sample lacks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrep.stable_hash import stable_hash

HASHES = 1 << 63
"""How many values `stable_hash` can have."""


def is_present(seed: int, key: str, modality: str, share: float) -> bool:
    """Whether a sample keeps a modality: each is absent with probability ``share``, independently of the others.

    A hash of (seed, key, modality) decides, and nothing else: not the order of the samples, nor the batch, nor the rank. With a
    greater share, what was absent stays absent. A sample may lose all modalities; it then stands in its batch as padding does.
    """
    return stable_hash(f"missing {seed} {key} {modality}") >= share * HASHES


def presence(seed: int, keys: Sequence[str], modalities: Sequence[str], share: float) -> dict[str, Tensor]:
    """Modality -> bool ``[N]``."""
    return {name: torch.tensor([is_present(seed, key, name, share) for key in keys]) for name in modalities}
