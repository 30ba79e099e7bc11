"""The two towers of an open_clip architecture, built apart, and what open_clip says of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmrep.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Preprocessing:
    """How an image tower wants its pictures, and how wide its output is."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int


def create_towers(architecture: str) -> Any:
    """An open_clip model with ``visual`` and ``text`` as separate modules, random weights.

    Raises:
        ConfigError: If open_clip has no such architecture.
    """
    import open_clip  # twenty CPU-seconds that only its users should pay

    if architecture not in open_clip.list_models():
        raise ConfigError(
            f"open_clip has no architecture '{architecture}'", fix=did_you_mean(architecture, open_clip.list_models())
        )
    return open_clip.create_model(architecture, pretrained=None, force_custom_text=True)


def preprocessing(visual: Any) -> Preprocessing:
    """What open_clip records on an image tower."""
    config = visual.preprocess_cfg
    size = config["size"]
    side = size if isinstance(size, int) else size[0]
    return Preprocessing(side, tuple(config["mean"]), tuple(config["std"]), output_width(visual))


def output_width(tower: Any) -> int:
    """Width of a tower's output."""
    return int(tower.output_dim)
