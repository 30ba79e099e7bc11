"""Networks of timm and torchvision without their classifiers, and what the two libraries say of their pictures."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from mmrep.encoders.hub import without_waiting
from mmrep.errors import CheckpointError, ConfigError, did_you_mean
from mmrep.weights import load_weights, read_weights


@dataclass(frozen=True)
class Preprocessing:
    """How a backbone wants its pictures.

    Attributes:
        size: In pixels a side.
        resize: Pixels of the shorter side before the centre is cut out; of both sides where ``squash``.
        squash: Whether pictures are resized to a square, whatever their shape.
        interpolation: ``bilinear``, ``bicubic``, ...
        mean, std: Of each channel, of pixels in [0, 1].
    """

    size: int
    resize: int
    squash: bool
    interpolation: str
    mean: list[float]
    std: list[float]

    def transform(self) -> Callable[[Any], Tensor]:
        """A picture to uint8 ``[3, size, size]``."""
        to = [self.resize, self.resize] if self.squash else self.resize
        resized = v2.Resize(to, interpolation=InterpolationMode(self.interpolation))
        composed: Callable[[Any], Tensor] = v2.Compose([resized, v2.CenterCrop(self.size), v2.PILToTensor()])
        return composed


def create_timm(architecture: str, pretrained: bool | str, **options: Any) -> nn.Module:
    """A network of timm without classifier, with its weights where asked for.

    Args:
        architecture, pretrained: See `TimmImageEncoder`.
        **options: Of ``timm.create_model``: ``in_chans``, ``img_size``.

    Raises:
        ConfigError: On an unknown architecture.
        CheckpointError: If the weights cannot be had, or do not fit.
    """
    import timm  # seconds that only its users should pay

    if not timm.is_model(architecture.split(".", 1)[0]):
        raise ConfigError(
            f"timm has no architecture '{architecture}'", fix=did_you_mean(architecture, timm.list_models())
        )
    try:
        with without_waiting():
            network: nn.Module = timm.create_model(
                architecture, pretrained=pretrained is True, num_classes=0, **options
            )
    except Exception as error:  # an unknown tag, or no network: of the hub's client, urllib, or timm's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        if pretrained is not True:
            raise ConfigError(
                f"timm cannot build '{architecture}' ({reason})", fix="see timm.list_models(pretrained=True)"
            ) from error
        raise CheckpointError(
            f"timm's weights cannot be had ({type(error).__name__}: {reason})",
            where=architecture,
            fix="check the name and the network, or give the path of a weights file: pretrained: FILE.safetensors",
        ) from error
    if isinstance(pretrained, str):
        load_weights(
            network, _for_timm(network, read_weights(pretrained), options.get("in_chans", 3)), where=pretrained
        )
    return network


def _for_timm(network: Any, weights: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """Without the classifier; sizes and the first convolution's channels adapted as timm does it.

    Not by timm's own loader: where the classifier goes, it lets any other name be missing too.
    """
    from timm.models import adapt_input_conv

    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    weights = dict(adapt(weights, network)) if adapt is not None else weights

    names = network.pretrained_cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    kept = (
        {name: tensor for name, tensor in weights.items() if not name.startswith(classifiers)}
        if classifiers
        else weights
    )
    first = network.pretrained_cfg.get("first_conv")
    if channels != 3 and isinstance(first, str) and f"{first}.weight" in kept:
        kept[f"{first}.weight"] = adapt_input_conv(channels, kept[f"{first}.weight"])
    return kept


def output_width(network: Any) -> int:
    """Width of what a network of timm without classifier gives."""
    return int(getattr(network, "head_hidden_size", None) or network.num_features)


def image_size_options(architecture: str, size: tuple[int, int]) -> dict[str, Any]:
    """What tells a network of timm the size of its input: nothing where any size will do."""
    import timm

    if not timm.is_model(architecture.split(".", 1)[0]):
        return {}  # `create_timm` says so
    config = timm.get_pretrained_cfg(architecture)
    return {"img_size": size} if config is not None and config.fixed_input_size else {}


def timm_preprocessing(network: nn.Module, image_size: int | None) -> Preprocessing:
    """What timm records of a network's pictures.

    Raises:
        ConfigError: If they are not square, or are framed.
    """
    from timm.data.config import resolve_data_config

    config = resolve_data_config({} if image_size is None else {"img_size": image_size}, model=network)
    height, width = config["input_size"][1:]
    if height != width or config["crop_mode"] == "border" or config["interpolation"] == "random":
        raise ConfigError(
            f"pictures of {height} x {width} with crop_mode={config['crop_mode']} are not provided for",
            fix="choose an architecture with square pictures, cut at the centre",
        )
    resize = math.floor(height / config["crop_pct"])
    squash, interpolation = config["crop_mode"] == "squash", config["interpolation"]
    return Preprocessing(height, resize, squash, interpolation, list(config["mean"]), list(config["std"]))


def create_torchvision(architecture: str) -> tuple[nn.Module, Preprocessing]:
    """With random weights, and the preprocessing of its default ones."""
    from torchvision import models

    if architecture not in (known := models.list_models(module=models)):
        raise ConfigError(f"torchvision has no architecture '{architecture}'", fix=did_you_mean(architecture, known))
    given = models.get_model_weights(architecture).DEFAULT.transforms()
    mode = InterpolationMode(given.interpolation).value
    size, resize = given.crop_size[0], given.resize_size[0]
    prepared = Preprocessing(size, resize, False, mode, list(given.mean), list(given.std))
    return models.get_model(architecture, weights=None), prepared


def torchvision_weights(architecture: str) -> dict[str, Tensor]:
    from torchvision import models

    try:
        default = models.get_model_weights(architecture).DEFAULT
        weights: dict[str, Tensor] = default.get_state_dict(progress=False, weights_only=True, check_hash=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # no network, a broken or unsafe download
        raise CheckpointError(
            f"torchvision's weights cannot be had ({type(error).__name__}: {str(error)[:120]})",
            where=architecture,
            fix="check the network, or give the path of a weights file: pretrained: FILE.pth",
        ) from error
    return weights


def without_classifier(network: nn.Module, architecture: str) -> tuple[int, str]:
    """Take off the last linear layer; gives the width of what it took, and its name."""
    linear = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    auxiliary = any("aux" in name.casefold() for name, _ in network.named_modules())
    if not linear or auxiliary or not linear[-1][0].startswith(("fc", "classifier", "head")):
        raise ConfigError(
            f"{architecture} does not end in one linear layer", fix="choose another architecture, or timm's"
        )
    name, part = linear[-1]
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, nn.Identity())
    return part.in_features, name
