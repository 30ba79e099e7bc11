"""The processes that Lightning starts for the other devices of a machine: they end together."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from mmrep.modules.fault_tolerance.watchdog import GRACE, Watchdog, end

PERIOD = 0.5
"""Seconds between looks at the processes."""


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, except for a process that dies: the others are told which and why.

    Lightning's own kills this process too, by SIGKILL, so that nobody says anything.

    Args:
        launcher: What Lightning chose.
        watchdog: Is told of a process that died.
    """

    def __init__(self, launcher: _SubprocessScriptLauncher, watchdog: Watchdog) -> None:
        super().__init__(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self.watchdog = watchdog

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the processes, and run ``function`` as the first of them."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._observe, name="mmrep-children", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _observe(self) -> None:
        """Wait for all to end well, or for the first that does not."""
        codes: list[int | None] = [None]
        while None in codes:
            codes = [process.poll() for process in self.procs]
            for number, process in enumerate(self.procs, start=1):
                if process.returncode:
                    self._lost(number, process)
                    return
            time.sleep(PERIOD)

    def _lost(self, number: int, process: subprocess.Popen[bytes]) -> None:
        code = process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        first = int(os.environ.get("NODE_RANK", 0)) * self.num_processes
        self.watchdog.blame(f"rank {first + number} (process {process.pid}) {how}")
        time.sleep(GRACE)  # the group may not be there yet, or this process may be inside a collective for ever
        for other in self.procs:
            if other.poll() is None:
                other.kill()
        if not self.watchdog.over:
            end(str(self.watchdog.reason))
