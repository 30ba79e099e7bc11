"""A faiss index beside the embeddings: cells of near rows, of which a query visits a few (IVF-Flat, inner product)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrep.errors import DataError
from mmrep.files import replacing
from mmrep.search.manifest import AGAIN, NAME, read_json, write_json

MOST_CELLS = 65536
LEAST_PER_CELL, MOST_PER_CELL = 39, 64
"""Rows per cell: what faiss wants at least to find cells by, and what is enough."""
VISITED = 16
"""A query visits a sixteenth of the cells, and at least so many."""

Tiles = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Gives a pass over numbers int64 ``[n]`` and rows ``[n, D]``."""


def faiss_installed() -> bool:
    """Whether faiss is there."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def is_built(folder: Path, target: str) -> bool:
    """Whether the folder has a faiss index of its present manifest."""
    path, record = _places(folder, target)
    if not (path.is_file() and record.is_file()):
        return False
    try:
        content = read_json(record)
    except DataError:
        return False
    return content.get("manifest") == _manifest_digest(folder) and content.get("bytes") == path.stat().st_size


def build(folder: Path, target: str, tiles: Tiles, *, rows: int, width: int) -> None:
    """Write ``index-TARGET.faiss``, and beside it which manifest it was made of.

    The cells are about ``4 sqrt(N)``, found on evenly spaced rows. The index is made in memory: ``4 N D`` bytes.

    Args:
        folder: Of the embeddings.
        target: Modality of the rows.
        tiles: The rows.
        rows, width: How many there are, and D.
    """
    import faiss

    cells = max(1, min(round(4 * math.sqrt(rows)), rows // LEAST_PER_CELL, MOST_CELLS))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # fewer only where there are fewer
    index.train(_evenly_spaced(tiles, rows, MOST_PER_CELL * cells))
    for numbers, part in tiles():
        if not bool(part.isfinite().all()):
            raise DataError(f"rows of '{target}' hold NaN or infinity", where=folder, fix=AGAIN)
        index.add_with_ids(part.numpy(), numbers.numpy())
    path, record = _places(folder, target)
    with replacing(path) as beside:
        faiss.write_index(index, str(beside))
        size = beside.stat().st_size
    write_json(record, {"manifest": _manifest_digest(folder), "bytes": size, "rows": rows, "cells": cells})


def nearest(folder: Path, target: str, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Candidates by inner product.

    Args:
        folder, target: See `build`.
        queries: ``[Q, D]``.
        count: How many for each.

    Returns:
        Numbers int64 ``[Q, count]``, -1 where fewer were found, and the rows ``[Q, count, D]``.

    Raises:
        DataError: If the file is broken.
    """
    import faiss

    path, _ = _places(folder, target)
    try:
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise DataError("broken faiss index", where=path, fix="delete it; it is built again") from error
    if index.d != queries.shape[1]:
        raise DataError(f"a faiss index of width {index.d}", where=path, fix="delete it; it is built again")
    index.nprobe = max(VISITED, index.nlist // VISITED)
    _, numbers, rows = index.search_and_reconstruct(np.ascontiguousarray(queries.cpu().numpy(), np.float32), count)
    return torch.from_numpy(numbers), torch.from_numpy(rows)


def _evenly_spaced(tiles: Tiles, rows: int, most: int) -> np.ndarray:
    step, first, chosen = max(1, rows // most), 0, []
    for _, part in tiles():
        chosen.append(part[-first % step :: step])
        first += len(part)
    return torch.cat(chosen).numpy()


def _places(folder: Path, target: str) -> tuple[Path, Path]:
    return folder / f"index-{target}.faiss", folder / f"index-{target}.json"


def _manifest_digest(folder: Path) -> str:
    return hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
