"""One run at a time builds in a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmrep.errors import DataError

SECONDS_FOR_ORPHANS = 5.0
"""Until the workers of a killed run have noticed and are gone."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out. Forked workers hold the lock too, so that none of a killed run still writes here.

    Raises:
        DataError: If another run holds it, or has put the folder in place meanwhile.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + SECONDS_FOR_ORPHANS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DataError(
                        "another run is building here", where=folder, fix="wait for it, or give another --out"
                    ) from None
                time.sleep(0.1)
        if not folder.exists() or not os.path.samestat(
            folder.stat(), os.fstat(descriptor)
        ):  # the other has put it in place meanwhile
            raise DataError("another run has just ended here", where=folder, fix="look at what it left")
        yield
    finally:
        os.close(descriptor)
