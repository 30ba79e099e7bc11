"""Activation checkpointing: a network's blocks keep their inputs alone, and are computed again when backward reaches them.

Chen et al. 2016, "Training deep nets with sublinear memory cost". Gradients are the same; a step costs one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmrep.encoders.base import Encoder
from mmrep.encoders.layers import is_sequence
from mmrep.encoders.sample_mixing import mixing_layers
from mmrep.errors import ConfigError


def checkpoint_activations(encoder: Encoder) -> int:
    """Checkpoint every block of an encoder's backbone, in place. Names in its state dict stay as they are.

    Networks of transformers do it themselves, since a decoder's blocks also write to a cache. Of all others the blocks' own
    ``forward`` is wrapped: the same way for towers of open_clip, timm, torchvision and ours.

    Returns:
        How many blocks or networks that is; 0 for an encoder of plain layers, which keep little more than a block's input.

    Raises:
        ConfigError: If a block has a layer with statistics of batches, which would count each batch twice.
    """
    found, inside = 0, ""
    for name, network in encoder.named_modules():
        enable = _own_way(network)
        if enable is not None and not (inside and name.startswith(inside)):
            for path, layer in _computed_again(name, network):
                _refuse_statistics(path, layer)
            enable({"use_reentrant": False})
            found, inside = found + 1, f"{name}."
    wrapped = [] if found else list(_blocks(encoder))
    for name, block in wrapped:
        _refuse_statistics(name, block)
        block.forward = partial(_again, block.forward)
    return found + len(wrapped)


def _own_way(network: nn.Module) -> Callable[[dict[str, Any]], None] | None:
    """The method of a network of transformers; its older name is going away."""
    if not getattr(network, "supports_gradient_checkpointing", False):
        return None
    name = "activation_checkpointing_enable"
    enable = getattr(network, name if hasattr(network, name) else "gradient_checkpointing_enable", None)
    return enable if callable(enable) else None


def _computed_again(name: str, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and layers that a network of transformers checkpoints: those of its class for it, else perhaps any."""
    layers = [(path, layer) for path, layer in network.named_modules(prefix=name) if _is_checkpointed(layer)]
    yield from layers or [(name, network)]


def _is_checkpointed(layer: nn.Module) -> bool:
    # By name: whoever has such a layer has imported transformers, which takes seconds.
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(layer).__mro__)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (
        checkpoint(forward, *args, use_reentrant=False, **kwargs)
        if torch.is_grad_enabled()
        else forward(*args, **kwargs)
    )


def _blocks(network: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and blocks: the innermost entries of ``nn.Sequential`` and ``nn.ModuleList`` that are made of layers.

    Of stages, which are sequences of blocks, these are the blocks.
    """
    for name, child in network.named_children():
        path = f"{prefix}{name}"
        if path == "head":  # the projection head's few layers
            continue
        inner = list(_blocks(child, f"{path}."))
        if inner:
            yield from inner
        elif is_sequence(network) and _has_layers(child):
            yield path, child


def _has_layers(module: nn.Module) -> bool:
    """Whether a module is made of layers with weights; a linear layer with peft's adapters is still one layer."""
    return not hasattr(module, "get_base_layer") and any(list(child.parameters()) for child in module.children())


def _refuse_statistics(name: str, block: nn.Module) -> None:
    for layer_name, layer in mixing_layers(block):
        raise ConfigError(
            f"activation_checkpointing: {type(layer).__name__} would count each batch twice in its statistics",
            where=f"{name}.{layer_name}",
            fix="freeze it, choose an architecture with LayerNorm or GroupNorm, or leave activation_checkpointing out",
        )
