"""Computational sequences of the CMU Multimodal SDK: HDF5 files ``NAME/data/VIDEO/features`` and ``.../intervals``."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmrep.errors import DataError

MAX_VIDEO_BYTES = 2 << 30
"""Of the features of one video: looked at in the header before they are read."""


class SequenceFile:
    """One .csd file. It is opened when it is first asked, once in each process, and holds the video that it read last.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: tuple[str, tuple[np.ndarray, np.ndarray]] | None = None

    def __contains__(self, video: str) -> bool:
        return video in _data(self.path, os.getpid())

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
            features, intervals = (
                _array(_data(self.path, os.getpid())[video], name) for name in ("features", "intervals")
            )
        except (KeyError, OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"features or intervals cannot be read ({error})", where=where) from error
        if intervals.ndim != 2 or intervals.shape[1] != 2 or len(intervals) != len(features) or features.ndim < 2:
            raise DataError(f"features {list(features.shape)}, intervals {list(intervals.shape)}", where=where)
        return features, intervals.astype(np.float64)


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
        return file[name]["data"]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"no computational sequence ({error})", where=path, fix="fetch it again") from error


def _array(video: Any, name: str) -> np.ndarray:
    """A data set that lies in the file itself: a link to another file is not followed."""
    import h5py

    if not isinstance(video.get(name, getlink=True), h5py.HardLink) or video[name].external:
        raise ValueError(f"'{name}' leads out of the file")
    if video[name].size * video[name].dtype.itemsize > MAX_VIDEO_BYTES:
        raise ValueError(f"'{name}' has more than {MAX_VIDEO_BYTES} bytes")
    return np.asarray(video[name][()])


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
