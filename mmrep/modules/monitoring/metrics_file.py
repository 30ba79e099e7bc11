"""``metrics.csv`` of a run."""

from __future__ import annotations

import csv
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only

from mmrep.files import replacing


class MetricsFile(CSVLogger):
    """Lightning's CSV logger, except that a full disk ends no training, and a new column never leaves half a table.

    Rows that could not be written follow as soon as there is room again.
    """

    _complained = False

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are not on the disk yet, or say once why not."""
        experiment: Any = self.experiment
        path, rows = Path(experiment.metrics_file_path), list(experiment.metrics)
        size = path.stat().st_size if path.is_file() else None
        try:
            columns = sorted(set(experiment.metrics_keys).union(*rows))
            if size is not None and columns != experiment.metrics_keys:
                size = _widen(path, columns)
            experiment.metrics_keys = columns
            super().save()
            self._complained = False
        except OSError as error:
            experiment.metrics = rows
            with suppress(OSError):  # no half a row
                os.truncate(path, size) if size is not None else path.unlink()
            if not self._complained:
                print(f"mmrep: warning: metrics cannot be written ({error.strerror}) [{path}]", file=sys.stderr)
            self._complained = True


def _widen(path: Path, columns: list[str]) -> int:
    """Give a table more columns, at once or not at all; gives its size in bytes."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with replacing(path) as part, part.open("w", newline="") as table:
        writer = csv.DictWriter(table, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    return path.stat().st_size
