"""What all processes of a run say on stderr, and what of it is said again."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TAG = re.compile(r"<process \d+> ")


class TaggedStderr(io.TextIOBase):
    """Writes whole lines to file descriptor 2, each behind the number of the process: also in those that are forked."""

    def __init__(self) -> None:
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            os.write(2, f"<process {os.getpid()}> {line}\n".encode())
        return len(text)

    def fileno(self) -> int:
        return 2


@contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    """What this process and those that it forks say on stderr goes to a file, with every warning that would be shown."""
    sys.stderr.flush()
    descriptor, stream = os.dup(2), sys.stderr
    with path.open("wb") as file, warnings.catch_warnings():
        os.dup2(file.fileno(), 2)
        sys.stderr, warnings.showwarning = TaggedStderr(), _say  # type: ignore[assignment]  # names of arguments differ
        try:
            yield
        finally:
            sys.stderr = stream
            os.dup2(descriptor, 2)
            os.close(descriptor)


def _say(message: Warning | str, category: type[Warning], file: str, line: int, *_: Any) -> None:
    print(warnings.formatwarning(message, category, file, line).splitlines()[0], file=sys.stderr)


def repeated(said: Sequence[str], processes: int) -> dict[str, int]:
    """Lines that a process has said more than once; of lines without a process, those that came more often than there are any.

    Args:
        said: Lines of the file.
        processes: Of the run.
    """
    counts = Counter(line for line in said if TAG.sub("", line, count=1).strip())
    return {line: count for line, count in counts.items() if count > (1 if TAG.match(line) else processes)}
