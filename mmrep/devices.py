"""Where a command or a worker of it computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrep.errors import ConfigError

if TYPE_CHECKING:
    import torch


def choose_device(asked: str | None, *, fix: str = "use cpu, or cuda on a machine with a GPU") -> torch.device:
    """The device of ``--device``; by default the first GPU, or the CPU where there is none.

    Args:
        asked: A name of torch's.
        fix: What the error advises.

    Raises:
        ConfigError: If there is no such device.
    """
    import torch

    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: there is none here", fix=fix) from error
