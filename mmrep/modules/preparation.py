"""What is done to encoders before they are trained: checked for parts, checkpointed, compiled."""

from __future__ import annotations

import torch

from mmrep.encoders import Encoder
from mmrep.encoders.activation_checkpointing import checkpoint_activations
from mmrep.errors import ConfigError, check_choice
from mmrep.model import MultimodalModel
from mmrep.modules.gradient_caching import GradientCaching, refuse_mixing_layers


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
    encoders: dict[str, Encoder] = dict(model.encoders.items())  # type: ignore[arg-type]  # of a ModuleDict
    if activation_checkpointing and not sum([checkpoint_activations(encoder) for encoder in encoders.values()]):
        kinds = ", ".join(f"{name} ({type(encoder).__name__})" for name, encoder in encoders.items())
        raise ConfigError(
            f"activation_checkpointing: no encoder has blocks of layers: {kinds}",
            fix="set micro_batch_size, which bounds the memory of any encoder",
        )
    if backend is not None:
        for encoder in encoders.values():
            encoder.compile(backend=backend)
