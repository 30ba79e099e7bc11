"""Gradient caching: a batch that no memory holds at once goes through the encoders in parts, with its exact gradient.

The loss needs all rows, and a row's gradient needs its encoder's activations: of one part at a time (GradCache, Gao et al.
2021). Each part's pass is checkpointed, so that it leaves its rows and nothing else; the loss is evaluated once, on the rows of
the whole step; and backward computes one part after the other again, with the random numbers it had, and frees it. It is one
graph and one backward pass: a loss, its parameters, autocast and DDP see nothing of it, and DDP reduces each gradient once,
when the last part has added to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmrep.batch import Input
from mmrep.encoders import Encoder
from mmrep.encoders.sample_mixing import changed_buffers, mixing_layers
from mmrep.errors import ConfigError
from mmrep.model import MultimodalModel

OPTION = "model.init_args.micro_batch_size"


@dataclass(frozen=True)
class GradientCaching:
    """How `mmrep.model.MultimodalModel.forward` runs an encoder.

    Args:
        micro_batch_size: Samples of a part; the last may be smaller. Of a sample with views all go together.
        kept: So many parts of each modality, the last, keep their activations and are not computed again: memory for time.

    Raises:
        ConfigError: On impossible sizes.
    """

    micro_batch_size: int
    kept: int = 0

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.kept < 0:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} must be at least 1, kept_micro_batches={self.kept} at least 0"
            )

    def __call__(self, encoder: Encoder, inputs: Input) -> Tensor:
        """Inputs of a batch to embeddings ``[B, D]`` or ``[B, V, D]``, as `Encoder.forward` gives them."""
        parts = split(inputs, self.micro_batch_size)
        worthwhile = len(parts) > 1 and torch.is_grad_enabled() and _trains_backbone(encoder)
        again = len(parts) - self.kept if worthwhile else 0
        rows: list[Tensor] = []
        for number, part in enumerate(parts):
            # Weights that autocast has cast are shared by what follows, and their gradients would add up in half
            # precision. Cast for each part, they add up in that of the weights.
            torch.clear_autocast_cache()
            rows.append(checkpoint(encoder, part, use_reentrant=False) if number < again else encoder(part))
        return torch.cat(rows)


def make_caching(micro_batch_size: int | None, kept_micro_batches: int) -> GradientCaching | None:
    """What a module's settings ask for.

    Raises:
        ConfigError: On impossible sizes, or parts to keep where there are none.
    """
    if micro_batch_size is not None:
        return GradientCaching(micro_batch_size, kept_micro_batches)
    if kept_micro_batches:
        raise ConfigError(f"kept_micro_batches={kept_micro_batches} without parts", fix=f"set {OPTION}")
    return None


def warn_of_accumulation(batches: int) -> None:
    """Say what Lightning's accumulation is for a contrastive loss, if it is on: a mean of losses of small batches."""
    if batches > 1:
        rank_zero_warn(
            f"accumulate_grad_batches={batches} adds the gradients of {batches} losses, each with the negatives of its own "
            f"batch only; for one loss over all of them raise data.global_batch_size and set {OPTION}",
            category=UserWarning,
        )


def split(inputs: Input, size: int) -> list[Input]:
    """The inputs of a batch in parts of ``size`` samples; a batch of none is one part."""
    if isinstance(inputs, Tensor):
        return list(inputs.split(size))
    return [list(part) for part in zip(*(views.split(size) for views in inputs), strict=True)]


def _trains_backbone(encoder: Encoder) -> bool:
    """Whether anything but the head is trained. What is frozen keeps no activations, and there is nothing to save."""
    return any(weight.requires_grad for name, weight in encoder.named_parameters() if not name.startswith("head."))


def refuse_mixing_layers(model: MultimodalModel) -> None:
    """Refuse encoders whose rows are other ones in parts.

    Raises:
        ConfigError: With the first such layer.
    """
    for modality, encoder in model.encoders.items():
        for name, layer in mixing_layers(encoder):
            raise ConfigError(
                f"micro_batch_size: {type(layer).__name__} mixes the samples of a batch, which then cannot go in parts",
                where=f"{modality}.{name}",
                fix=_advice(modality, name),
            )


def refuse_changing_state(model: MultimodalModel) -> None:
    """Refuse encoders that remember what went through them: parts go twice.

    Raises:
        ConfigError: With the first such buffer.
    """
    refuse_mixing_layers(model)
    encoders: dict[str, Any] = dict(model.encoders.items())
    for modality, encoder in encoders.items():
        for name in changed_buffers(encoder):
            raise ConfigError(
                "micro_batch_size: a forward pass changes this buffer, and each part passes twice",
                where=f"{modality}.{name}",
                fix=f"freeze it (freeze: ['{modality}.{name.rpartition('.')[0] or '*'}']), or leave {OPTION} out",
            )


def _advice(modality: str, name: str) -> str:
    if name.startswith("head."):
        return f"leave batch_norm of the encoder '{modality}' out"
    return (
        f"freeze it (freeze: ['{modality}.{name}'], or its whole backbone), choose an architecture with LayerNorm or "
        f"GroupNorm, or leave {OPTION} out"
    )
