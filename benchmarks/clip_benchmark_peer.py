"""CLIP_benchmark as it is published, in an environment of its own on top of ours.

It needs an older NumPy and webdataset than mmrep. Those and the package itself go into a folder that comes first on the path
of a fresh process; torch and open_clip are ours. ``python -m benchmarks.clip_benchmark_peer`` makes the folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VERSION = "1.6.2"
PACKAGES = (
    f"clip-benchmark=={VERSION}",
    "numpy==2.3.5",
    "webdataset==0.2.111",
    "pycocoevalcap==1.2",
    "pycocotools==2.0.11",
)


def overlay() -> Path:
    """The folder with CLIP_benchmark and what it needs of its own, made if it is not there.

    Raises:
        OSError: If the packages cannot be fetched.
    """
    root = os.environ.get("MMREP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrep"
    folder = Path(root) / f"clip-benchmark-{VERSION}"
    if not folder.is_dir():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part), *PACKAGES]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            shutil.rmtree(part, ignore_errors=True)
            raise OSError(f"CLIP_benchmark cannot be installed: {made.stderr.strip()[-300:]}")
        part.replace(folder)
    return folder


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """``clip_benchmark ARGUMENTS`` in a process of its own, without the network."""
    environment = {**os.environ, "PYTHONPATH": str(overlay()), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "clip_benchmark.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    print(overlay())
