"""Which weights are trained, and how fast: frozen parts, and learning rates that fall with a layer's depth."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from mmrep.errors import ConfigError, did_you_mean
from mmrep.model import MultimodalModel

ENCODERS = "encoders."


def freeze_parameters(model: MultimodalModel, patterns: Iterable[str]) -> list[str]:
    """Stop training what the patterns name.

    Args:
        model: Its parameters are changed.
        patterns: Names of modules or parameters, with ``*`` for anything: ``image.*`` or ``image`` for a modality's whole
            encoder, ``image.tower`` for its backbone, ``*.bias``, ``loss.*``. ``encoders.`` before a modality may be left out.

    Returns:
        The names of the parameters that the patterns match.

    Raises:
        ConfigError: If a pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    frozen: dict[str, None] = {}
    for pattern in patterns:
        matched = [name for name in parameters if _matches(name, pattern)]
        if not matched:
            raise ConfigError(f"freeze: '{pattern}' matches no parameter", fix=did_you_mean(pattern, _modules(model)))
        frozen |= dict.fromkeys(matched)
    for name in frozen:
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze: nothing is left to train", fix="leave a head or an encoder out")
    return list(frozen)


def _matches(name: str, pattern: str) -> bool:
    names = (name, name.removeprefix(ENCODERS))
    return any(fnmatchcase(name, end) for name in names for end in (pattern, f"{pattern}.*"))


def _modules(model: MultimodalModel) -> list[str]:
    """What a pattern may have meant: modalities and their parts."""
    names = (name.removeprefix(ENCODERS) for name, _ in model.named_modules())
    return [name for name in names if name and name.count(".") <= 1]


def keep_frozen_in_eval(model: MultimodalModel) -> None:
    """Put every part of an encoder that has only frozen parameters into evaluation mode.

    Its dropout is off, and BatchNorm uses its stored statistics and keeps them: a locked tower gives what the pretrained one
    gives (LiT, Zhai et al. 2022).
    """
    for module in model.encoders.modules():
        own = list(module.parameters())
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def depth_scales(model: MultimodalModel, decay: float) -> dict[int, float]:
    """What each parameter's learning rate is multiplied with.

    Args:
        model: Its encoders say their `mmrep.encoders.Encoder.layers`.
        decay: Of ``n`` layers, that with ``d`` others behind it gets ``decay ** (d + 1)``; heads and the loss get 1.

    Returns:
        ``id`` of a parameter -> factor, for those whose factor is not 1.

    Raises:
        ConfigError: If ``decay`` is not in (0, 1].
    """
    if not 0 < decay <= 1:
        raise ConfigError(f"layer_decay={decay} must be above 0 and at most 1")
    scales: dict[int, float] = {}
    for encoder in model.by_modality.values() if decay < 1 else ():
        layers: list[list[nn.Parameter]] = encoder.layers()
        for behind, layer in enumerate(reversed(layers), start=1):
            scales |= {id(parameter): decay**behind for parameter in layer}
    return scales
