"""A disk without room, as any user can have it: a limit on the size of a file."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

from tests.killed import ended, forked

NO_NUMBER = 255
"""In place of the number of an error that has none."""


def errno_within(room: int, write: Callable[[], object], log: Path) -> int:
    """The number of the OSError of a write in a process whose files may have ``room`` bytes; 0 if there is no error."""

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        try:
            write()
        except OSError as error:
            return error.errno or NO_NUMBER
        return 0

    return ended(forked(work, log))
