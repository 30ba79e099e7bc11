"""`Averages`: running averages of what a model learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmrep.errors import CheckpointError, ConfigError
from mmrep.modules.freezing import ENCODERS


class Averages:
    """Exponential moving averages of a module's trained parameters and of the running statistics of its encoders.

    What is not trained has no copy here: frozen weights; the loss's buffers, which are memories of the run and no weights (a
    queue of features, counters of steps); integers. The loss's parameters are averaged as the others are, a temperature or
    prototypes, so that an average belongs together: prototypes are brought back to length 1 where they are used.

    Args:
        module: A `mmrep.modules.ContrastiveModule`. The averages begin as its weights.

    Attributes:
        tensors: Name in the module's state dict -> average.
        swapped: Whether the module holds the averages, and ``tensors`` the weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.swapped = False
        self._device: torch.device | str | None = None
        self._begin(_learnt(module))

    def to(self, device: torch.device | str) -> None:
        """Move the averages, those that begin later too."""
        self._device = device
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    def check(self, module: nn.Module) -> None:
        """Refuse weights that cannot be averaged.

        Raises:
            ConfigError: If they are of half precision: a step of a ten-thousandth is less than its rounding.
        """
        for name, tensor in _learnt(module).items():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise ConfigError(
                    f"EMA of weights in {str(tensor.dtype).removeprefix('torch.')}",
                    where=name,
                    fix="keep them in fp32: trainer.precision bf16-mixed",
                )

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """``average = decay * average + (1 - decay) * weight``, as one pass; equal on all ranks where the weights are.

        The average of what was frozen until now begins as the weight.
        """
        current = _learnt(module)
        self._begin(current)
        averages = [self.tensors[name] for name in current]
        weights = [
            tensor.detach().to(average.device) for tensor, average in zip(current.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the averages and the module's weights, a tensor at a time."""
        current = module.state_dict(keep_vars=True)
        for name, average in self.tensors.items():
            before = current[name].detach().clone()
            current[name].detach().copy_(average)
            average.copy_(before)
        self.swapped = not self.swapped

    def states(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a module's state dict as it is now: that of the averages, and that of the weights."""
        other = {**state, **self.tensors}
        return (dict(state), other) if self.swapped else (other, dict(state))

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Take the averages from a state dict.

        Args:
            state: With the averages.
            weights: With the weights they were saved beside; where the two differ an average had begun, even if it is of
                what is frozen for now.

        Raises:
            CheckpointError: If one is missing or of another shape.
        """
        unfrozen = {name for name in state.keys() - self.tensors.keys() if not torch.equal(state[name], weights[name])}
        self._begin({name: state[name] for name in unfrozen})
        for name, average in self.tensors.items():
            if name not in state or state[name].shape != average.shape:
                raise CheckpointError(f"the checkpoint has no average of '{name}'", fix="use its config.yaml")
            average.copy_(state[name])

    def _begin(self, weights: Mapping[str, Tensor]) -> None:
        """Averages of what has none."""
        self.tensors |= {
            name: w.detach().clone().to(self._device) for name, w in weights.items() if name not in self.tensors
        }


def _learnt(module: nn.Module) -> dict[str, Tensor]:
    """What is averaged, by name."""
    kept = module.state_dict(keep_vars=True)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    buffers = {name for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    statistics = {name for name in buffers if name.startswith(f"model.{ENCODERS}")}
    return {name: tensor for name, tensor in kept.items() if name in trained or name in statistics}
