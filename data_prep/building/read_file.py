"""Reading a file that a table or an annotation names: is it the file that is at fault, or the file system for a while?"""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from mmrep.errors import DataError

MISSING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
LASTING = MISSING | {errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EINVAL}
"""What the system says of a file itself. Anything else (ESTALE, EIO, ETIMEDOUT, ...) may be over at the next try."""


def is_passing(error: OSError) -> bool:
    """Whether the next try may succeed. Errors without a number are of what was read: libraries raise them."""
    return error.errno is not None and error.errno not in LASTING


def read_file(path: Path, limit: int, where: object) -> bytes:
    """The whole of a file.

    Args:
        path: Which.
        limit: Most bytes.
        where: What an error names.

    Raises:
        DataError: If it is missing, too large, or not to be read by this user.
        OSError: If the file system fails: that says nothing of the file.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise DataError("no such file", where=where)
        if facts.st_size > limit:
            raise DataError(f"more than {limit} bytes", where=where)
        return path.read_bytes()
    except ValueError as error:  # a null byte in the path
        raise DataError("no such file", where=where) from error
    except OSError as error:
        if is_passing(error):
            raise
        reason = "no such file" if error.errno in MISSING else f"cannot be read ({error.strerror})"
        raise DataError(reason, where=where) from error
