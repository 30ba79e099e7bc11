"""M x M weights between modalities."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmrep.errors import ConfigError

Matrix = list[list[float]]
"""Row: the modality that asks or assigns; column: the one that answers or predicts; in the order of ``modalities``."""


def check_matrix(matrix: Matrix, modalities: Sequence[str] | None, what: str, *, diagonal: bool = True) -> None:
    """Refuse weights that are no M x M matrix of numbers from 0 up, or all 0; without ``diagonal``, also all 0 beside it.

    Raises:
        ConfigError: Saying which.
    """
    if modalities is None:
        raise ConfigError(f"{what} as a matrix needs modalities, to know its order")
    size = len(modalities)
    if len(matrix) != size or any(len(row) != size for row in matrix):
        raise ConfigError(f"{what} must be {size} x {size} numbers, in the order {list(modalities)}")
    values = [value for row in matrix for value in row]
    used = [value for a, row in enumerate(matrix) for b, value in enumerate(row) if diagonal or a != b]
    if not all(value >= 0 and math.isfinite(value) for value in values) or not any(used):
        raise ConfigError(f"{what} must be numbers from 0 up, not all 0: {matrix}")


def weight_between(matrix: Matrix, modalities: Sequence[str], a: str, b: str) -> float:
    """The weight from ``a`` to ``b``."""
    return matrix[modalities.index(a)][modalities.index(b)]
