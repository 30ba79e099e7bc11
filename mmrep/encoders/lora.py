"""Adapters of low rank in a backbone (LoRA, Hu et al. 2021): few weights are trained, the pretrained ones stay.

Layers are adapted by peft. The projections of ``nn.MultiheadAttention``, which open_clip's towers use, are raw parameters: peft
adds its product to them and takes it away again at every step, so that they drift by rounding. Here they are parametrised; so
are the weights of layers that a network uses past the layer, where peft's adapters would never be called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mmrep.encoders.base import Encoder
from mmrep.encoders.reach import unreached_parameters
from mmrep.errors import ConfigError, did_you_mean

OPTIONS = ("r", "alpha", "dropout", "target_modules")
HEAD = "head"
ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
"""The parameters of ``nn.MultiheadAttention`` that are adapted."""


class LowRank(nn.Module):
    """``W + alpha / r * B A`` with ``W [out, in]`` frozen, ``A [r, in]``, ``B [out, r]`` zero at first."""

    def __init__(self, weight: Tensor, r: int, alpha: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, weight.shape[1]))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / r

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.lora_B @ self.lora_A)


def add_adapters(encoder: Encoder, lora: Mapping[str, Any]) -> None:
    """Freeze an encoder's backbone and put adapters into it; the projection head stays trainable.

    Args:
        encoder: Changed in place.
        lora: ``r``, the rank (8); ``alpha``, whose ratio to ``r`` scales what the adapters add (16); ``dropout`` before them
            (0; not where a weight is parametrised); ``target_modules``, ends of module names such as ``[query, value]``. By
            default all linear layers are adapted, and all of ``nn.MultiheadAttention``.

    Raises:
        ConfigError: If peft is not installed, an option is unknown or impossible, or a target matches nothing.
    """
    options = _checked(lora)
    layers, attentions = _targets(encoder, options["target_modules"])
    if layers:
        _adapt_layers(encoder, layers, options)
    for name in attentions:
        for parameter in ATTENTION:
            owner, _, own = f"{name}.{parameter}".rpartition(".")
            _parametrize(encoder.get_submodule(owner), own, options)
    _train_adapters(encoder)
    bypassed = {name.split(".lora_")[0] for name in unreached_parameters(encoder) if ".lora_" in name}
    for name in sorted(bypassed):  # layers whose weights are used past them, as WavLM's attention does
        parent, _, own = name.rpartition(".")
        layer: Any = encoder.get_submodule(name)
        setattr(encoder.get_submodule(parent), own, layer.get_base_layer())
        _parametrize(layer.get_base_layer(), "weight", options)
    _train_adapters(encoder)


def _parametrize(module: nn.Module, weight: str, options: Mapping[str, Any]) -> None:
    """Adapt a raw weight, where the module has it."""
    if isinstance(getattr(module, weight, None), Tensor):
        adapter = LowRank(getattr(module, weight), options["r"], options["alpha"])
        parametrize.register_parametrization(module, weight, adapter)


def _train_adapters(encoder: Encoder) -> None:
    for name, weight in encoder.named_parameters():
        weight.requires_grad_("lora_" in name or name.startswith(f"{HEAD}."))


def merge_adapters(module: nn.Module) -> nn.Module:
    """Fold all adapters into the weights that they adapt, in place: the module has the shape it had without ``lora``.

    Args:
        module: An encoder, or what holds encoders.

    Returns:
        The same module; its embeddings are what they were, up to rounding, and all its weights can be trained.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in list(module.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge()
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, part.get_base_layer())
        elif parametrize.is_parametrized(part):
            for weight in [w for w, steps in part.parametrizations.items() if isinstance(steps[0], LowRank)]:
                parametrize.remove_parametrizations(part, weight, leave_parametrized=True)
    for encoder in (part for part in module.modules() if isinstance(part, Encoder)):
        encoder.settings.pop("lora", None)
        encoder.__dict__.pop("peft_config", None)
        encoder.requires_grad_(True)
    return module


def _checked(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their defaults."""
    for name in lora:
        if name not in OPTIONS:
            raise ConfigError(f"lora has no option '{name}'", fix=did_you_mean(name, OPTIONS))
    options = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": None, **lora}
    r, alpha, dropout, targets = (options[name] for name in OPTIONS)
    numbers = isinstance(r, int) and all(isinstance(value, int | float) for value in (alpha, dropout))
    if not numbers or not (targets is None or (isinstance(targets, list) and targets)):
        raise ConfigError(
            f"lora of r={r!r}, alpha={alpha!r}, dropout={dropout!r}, target_modules={targets!r}",
            fix="r is a whole number, alpha and dropout are numbers, target_modules a list of names",
        )
    if r < 1 or not 0 <= dropout < 1:
        raise ConfigError(f"lora of r={options['r']}, dropout={options['dropout']}", fix="r >= 1, 0 <= dropout < 1")
    return options


def _targets(encoder: nn.Module, wanted: list[str] | None) -> tuple[list[str], list[str]]:
    """Names of the layers to adapt, and of the ``nn.MultiheadAttention``."""
    parts = {name: part for name, part in encoder.named_modules() if name and name.split(".")[0] != HEAD}
    attentions = [name for name, part in parts.items() if isinstance(part, nn.MultiheadAttention)]
    inside = tuple(f"{name}." for name in attentions)
    # Those of an attention are adapted with it: they are called as parameters, past their module.
    own = {name: part for name, part in parts.items() if not (inside and name.startswith(inside))}
    if wanted is None:
        layers = [name for name, part in own.items() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"]
        if not layers and not attentions:
            raise ConfigError(f"lora: {type(encoder).__name__} has no linear layers", fix="name its target_modules")
        return layers, attentions
    for end in wanted:
        if not any(_ends(name, end) for name in own):
            ends = sorted({name.rsplit(".", 1)[-1] for name, part in own.items() if list(part.parameters(False))})
            raise ConfigError(f"lora: no module's name ends in '{end}'", fix=did_you_mean(end, ends))
    chosen = [name for name in own if any(_ends(name, end) for end in wanted)]
    return [name for name in chosen if name not in attentions], [name for name in chosen if name in attentions]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _adapt_layers(encoder: nn.Module, names: list[str], options: Mapping[str, Any]) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("lora needs peft", fix="pip install 'mmrep[hf]'") from error
    config = LoraConfig(
        r=options["r"], lora_alpha=options["alpha"], lora_dropout=options["dropout"], target_modules=names, bias="none"
    )
    try:
        inject_adapter_in_model(config, encoder)
    except ValueError as error:  # a module of a type that peft does not adapt
        raise ConfigError(f"lora: {str(error).splitlines()[0][:160]}", fix="target linear layers") from error
