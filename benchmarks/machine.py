"""What a result was measured on and with."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version


def machine() -> dict[str, object]:
    """Hardware and system, without names."""
    return {"system": platform.system(), "architecture": platform.machine(), "cpus": os.cpu_count(), "gpus": _gpus()}


def versions(*packages: str) -> dict[str, str]:
    """Python's version, and those of packages."""
    return {"python": sys.version.split()[0], **{package: version(package) for package in packages}}


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
