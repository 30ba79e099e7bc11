"""Computational sequences of the CMU Multimodal SDK: HDF5 files ``NAME/data/VIDEO/features`` and ``.../intervals``."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.building.read_file import is_passing
from mmrep.errors import DataError

MAX_VIDEO_BYTES = 2 << 30
"""Of the features of one video: looked at in the header before they are read."""
MAX_CHUNK_BYTES = 64 << 20
"""HDF5 unpacks a chunk whole, however little of it is used; h5py and the SDK make chunks of 1 MiB at most."""


class SequenceFile:
    """One .csd file. It is opened when it is first asked, once in each process, and holds the video that it read last.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: tuple[str, tuple[np.ndarray, np.ndarray]] | None = None

    def __contains__(self, video: str) -> bool:
        data = _data(self.path, os.getpid())
        return "/" not in video and data.get(video, getlink=True) is not None

    def read(self, video: str) -> tuple[np.ndarray, np.ndarray]:
        """``(features [T, ...], intervals [T, 2])`` of a video, in seconds.

        Raises:
            DataError: If they are missing, damaged, of other shapes, or in another file.
        """
        if self._held is None or self._held[0] != video:
            self._held = video, self._read(video)
        return self._held[1]

    def _read(self, video: str) -> tuple[np.ndarray, np.ndarray]:
        where = f"{self.path}:{video}"
        try:
            group = _inside(_data(self.path, os.getpid()), video)
            features, intervals = (_array(_inside(group, name), name) for name in ("features", "intervals"))
            intervals = intervals.astype(np.float64)
        except (KeyError, OSError, ValueError, TypeError, AttributeError, MemoryError) as error:
            if isinstance(error, OSError) and is_passing(error):
                raise
            raise DataError(f"features or intervals cannot be read ({error})", where=where) from error
        if intervals.ndim != 2 or intervals.shape[1] != 2 or len(intervals) != len(features) or features.ndim < 2:
            raise DataError(f"features {list(features.shape)}, intervals {list(intervals.shape)}", where=where)
        return features, intervals


@lru_cache(maxsize=16)
def _data(path: Path, process: int) -> Any:
    """The group of the videos; ``process`` keeps a fork from using its parent's handle."""
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            "a .csd file is HDF5, which h5py reads", where=path, fix="pip install 'mmrep[mosei]'"
        ) from error
    try:
        file = h5py.File(path, "r")
        (name,) = file.keys()
        data = _inside(_inside(file, name), "data")
        if not isinstance(data, h5py.Group):
            raise ValueError("'data' is no group")
        return data
    except (OSError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, OSError) and is_passing(error):
            raise
        raise DataError(f"no computational sequence ({error})", where=path, fix="fetch it again") from error


def _inside(group: Any, name: str) -> Any:
    """A member of a group that lies in the file itself: no other link is followed, and none on the way.

    Raises:
        ValueError: If it is a link.
        KeyError: If there is none.
    """
    import h5py

    if "/" in name or not isinstance(group.get(name, getlink=True), h5py.HardLink | type(None)):
        raise ValueError(f"'{name}' leads out of the file")
    return group[name]


def _array(found: Any, name: str) -> np.ndarray:
    """A data set whose numbers lie in the file itself."""
    if found.external or found.is_virtual:
        raise ValueError(f"'{name}' leads out of the file")
    if found.size * found.dtype.itemsize > MAX_VIDEO_BYTES:
        raise ValueError(f"'{name}' has more than {MAX_VIDEO_BYTES} bytes")
    if math.prod(found.chunks or ()) * found.dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"'{name}' has chunks of more than {MAX_CHUNK_BYTES} bytes")
    return np.asarray(found[()])


def frames_within(frames: np.ndarray, intervals: np.ndarray, start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """The frames ``[T, ...]`` whose middle lies in ``[start, end)``, in the order of time, and their intervals."""
    middles = intervals.mean(axis=1)
    chosen = np.flatnonzero((middles >= start) & (middles < end))
    chosen = chosen[np.argsort(middles[chosen], kind="stable")]
    return frames[chosen], intervals[chosen]


def mean_by_interval(frames: np.ndarray, intervals: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """The mean of the frames whose middle lies in each span, over what is finite.

    Args:
        frames: ``[T, D]``.
        intervals: Of the frames, ``[T, 2]``.
        spans: ``[N, 2]``.

    Returns:
        ``[N, D]``, NaN where a span has no frame with a finite value.
    """
    middles = intervals.mean(axis=1)
    means = np.full((len(spans), frames.shape[1]), np.nan)
    for place, (start, end) in enumerate(spans.tolist()):
        inside = frames[(middles >= start) & (middles < end)].astype(np.float64)
        known = np.isfinite(inside)
        count = known.sum(axis=0)
        means[place, count > 0] = np.where(known, inside, 0.0).sum(axis=0)[count > 0] / count[count > 0]
    return means
