"""Writing shards: a thin layer over the `webdataset` package that makes them deterministic and whole."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmrep.errors import DataError


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]]) -> int:
    """Write samples as one WebDataset tar: the same samples give the same bytes.

    Args:
        path: The tar. It is written beside and renamed, so that it is either whole or not there.
        samples: Each has ``__key__`` and members by extension: bytes as they are, str as UTF-8, dict or list as JSON.
            What UTF-8 cannot hold becomes "?".

    Returns:
        How many samples were written.

    Raises:
        DataError: If a key cannot be a file name, or appears twice.
    """
    from webdataset import TarWriter  # imports torch: five seconds that a caller's --help should not pay

    beside = path.with_name(path.name + ".part")
    keys: set[str] = set()
    try:
        with (
            beside.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, user="", group="", format="PAX_FORMAT") as writer,
        ):
            for sample in samples:
                key = _checked_key(sample["__key__"], keys, path)
                writer.write({"__key__": key} | {ext: _encode(v) for ext, v in sample.items() if ext != "__key__"})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return len(keys)


def _checked_key(key: str, seen: set[str], path: Path) -> str:
    if not key or "." in key.rpartition("/")[2] or key.startswith("/") or ".." in key.split("/"):
        raise DataError(f"'{key}' cannot be a sample's key", where=path, fix="use a relative name without dots")
    if key in seen:
        raise DataError(f"key '{key}' appears twice", where=path)
    seen.add(key)
    return key


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text.encode(errors="replace")  # a lone surrogate, of a caption cut inside an emoji, becomes "?"


def npy_bytes(array: Any) -> bytes:
    """A numeric array as the bytes of an .npy file."""
    import numpy as np

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=False)
    return buffer.getvalue()


def write_npy(path: Path, array: Any) -> None:
    """A numeric array as an .npy file: the bytes of `numpy.save`, and an OSError wherever there is no room for them.

    Into a real file NumPy writes with the C library: on a full disk the error has no number, or the last bytes are missing
    without one. Given nothing but a method, it calls that.
    """
    import numpy as np

    with path.open("wb") as file:
        writer: Any = SimpleNamespace(write=file.write)
        np.lib.format.write_array(writer, np.asarray(array), allow_pickle=False)
