"""A file system that fails for a while."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def fail_to_open(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Opening a file of this name raises the system's error with this number."""
    real = Path.open

    def opening(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == name:
            raise OSError(code, os.strerror(code), str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opening)
