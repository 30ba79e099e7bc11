"""Texts of data on a terminal: shards, captions and error messages that quote them are other people's."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.table import Table

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tabs and line ends: a terminal obeys them, from colours to what is written into the clipboard."""
HALVES = re.compile("[\ud800-\udfff]")
"""Of characters, which no terminal's encoding has."""
WIDTH = 140
"""Of a table in a file or a pipe."""


def printable(text: object) -> str:
    """A text as it may be printed: without control characters."""
    return HALVES.sub("\N{REPLACEMENT CHARACTER}", CONTROLS.sub("", str(text)))


def print_table(table: Table, width: int | None = WIDTH) -> None:
    """Print a table, whatever its cells hold, as wide as the terminal or, elsewhere, as ``width``."""
    _console(None if sys.stdout.isatty() else width).print(table)


def _console(width: int | None) -> Console:
    from rich.console import Console
    from rich.segment import Segment

    class DataConsole(Console):
        """Strips what is drawn, not what draws it: rich's own colours are added later."""

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

    return DataConsole(width=width)
