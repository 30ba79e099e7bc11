"""Where a command computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrep.errors import ConfigError

if TYPE_CHECKING:
    import torch


def choose_device(asked: str | None) -> torch.device:
    """The device of ``--device``; by default the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: If there is no such device.
    """
    import torch

    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device {name}: there is none here", fix="use cpu, or cuda on a machine with a GPU"
        ) from error
