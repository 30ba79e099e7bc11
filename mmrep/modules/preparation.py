"""What is done to encoders before they are trained: checked for parts, checkpointed, compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmrep.encoders import Encoder
from mmrep.encoders.activation_checkpointing import checkpoint_activations
from mmrep.errors import ConfigError, check_choice
from mmrep.model import MultimodalModel
from mmrep.modules.gradient_caching import GradientCaching, refuse_mixing_layers

GRAPHS_OF_ENCODER = 16
"""More than enough for one encoder: torch's limit of 8, for training and evaluation."""


def check_backend(compile: bool | str) -> str | None:
    """The backend of ``torch.compile`` that a setting names; None for no compilation.

    Raises:
        ConfigError: If torch has none of that name.
    """
    if compile is False:
        return None
    if compile is True:
        return "inductor"
    check_choice("compile", compile, torch.compiler.list_backends(exclude_tags=()))
    return compile


def prepare_encoders(
    model: MultimodalModel, caching: GradientCaching | None, *, activation_checkpointing: bool, backend: str | None
) -> None:
    """Make the encoders of a model, whose frozen parts are known, ready for training; its state dict keeps its names.

    Args:
        model: Changed in place.
        caching: Whether batches come in parts.
        activation_checkpointing: Whether blocks are computed again: of all encoders that have any.
        backend: Of ``torch.compile``; None leaves the encoders as they are.

    Raises:
        ConfigError: If a layer forbids it, or no encoder has blocks.
    """
    if caching is not None:
        refuse_mixing_layers(model)
    encoders: dict[str, Any] = dict(model.encoders.items())
    if activation_checkpointing and not sum([checkpoint_activations(encoder) for encoder in encoders.values()]):
        kinds = ", ".join(f"{name} ({type(encoder).__name__})" for name, encoder in encoders.items())
        raise ConfigError(
            f"activation_checkpointing: no encoder has blocks of layers: {kinds}",
            fix="set micro_batch_size, which bounds the memory of any encoder",
        )
    if backend is not None:
        compile_encoders(list(encoders.values()), backend)


def compile_encoders(encoders: Sequence[Encoder], backend: str) -> None:
    """Compile encoders in place, each when it is first called.

    A graph is made for the first batch size, one for all others, one for a single sample; and again for evaluation.
    """
    # Torch counts graphs by the function that is compiled, which all encoders share, and gives up at 8.
    limit: int = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, GRAPHS_OF_ENCODER * len(encoders))
    for encoder in encoders:
        encoder.compile(backend=backend)
