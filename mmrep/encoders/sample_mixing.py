"""Layers by which the samples of a batch depend on each other, or that remember the batches they have seen.

Such a layer gives other rows when a batch goes through it in parts, and remembers twice what goes through it twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmrep.batch import Input
from mmrep.encoders.base import Encoder, placed

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
"""Of torch, ``SyncBatchNorm`` and the subclasses of timm and torchvision included."""
INSTANCE_NORMS = (nn.modules.instancenorm._InstanceNorm,)


def mixing_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers that mix samples, or keep statistics of batches, in the mode that they are in.

    A layer of another library's is known by its class, one of the user's own by a true attribute ``mixes_samples``. Layers in
    evaluation mode, as those of frozen parts are, use what they have stored and change nothing.
    """
    for name, layer in network.named_modules():
        if getattr(layer, "mixes_samples", False):
            mixes = layer.training
        elif isinstance(layer, BATCH_NORMS):
            mixes = layer.training or layer.running_mean is None
        elif isinstance(layer, INSTANCE_NORMS):
            mixes = layer.training and bool(layer.track_running_stats)
        else:
            mixes = False
        if mixes:
            yield name, layer


def changed_buffers(encoder: Encoder) -> list[str]:
    """Names of the buffers that a forward pass in training changes: averages, queues, the vectors of a spectral norm.

    Two blank samples go through the encoder in the mode that it is in. Buffers and random numbers are left as they were.
    """
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    weight = next(encoder.parameters(), torch.zeros(()))
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []), torch.no_grad():
        encoder.forward(_blanks(encoder, weight.device))  # not compiled: it runs once
    found = []
    for name, buffer in encoder.named_buffers():
        old = before.get(name)
        if old is not None and not _equal(old, buffer):
            found.append(name)
            if old.shape == buffer.shape:
                buffer.copy_(old)
    return found


def _blanks(encoder: Encoder, device: torch.device) -> Input:
    """Two blank samples."""
    blank = encoder.blank(train=True)

    def two(views: Tensor) -> Tensor:
        return placed(torch.stack([views, views]), encoder, device)

    return two(blank) if isinstance(blank, Tensor) else [two(views) for views in blank]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, NaN included."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
