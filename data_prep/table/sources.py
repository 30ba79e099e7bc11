"""Which modality comes from which columns, as the command line says it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmrep.data.decode import KINDS
from mmrep.errors import ConfigError, did_you_mean

VALUES = "values"
"""The kind whose cells are numbers: stored as an array."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Names of modalities and splits: they become parts of file names, which split at the first dot."""


@dataclass(frozen=True)
class Source:
    """A modality of the table.

    Args:
        name: The modality's name.
        kind: A key of `KINDS`, or ``values``.
        columns: Its columns; only ``values`` has more than one.
        prefix: What its members' extension begins with: ``"xray."`` for ``KEY.xray.png``.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    prefix: str = ""

    @property
    def stored_kind(self) -> str:
        return "array" if self.kind == VALUES else self.kind


def parse_values(text: str) -> Source:
    """``NAME=COLUMN,COLUMN,...``

    Raises:
        ConfigError: If it is not of that form.
    """
    name, _, columns = text.partition("=")
    return _checked(Source(name, VALUES, tuple(columns.split(","))), f"--values {text}", "write NAME=COLUMN,COLUMN")


def parse_modality(text: str) -> Source:
    """``NAME=KIND:COLUMN``, or ``NAME=values:COLUMN,COLUMN,...``

    Raises:
        ConfigError: If it is not of that form, or there is no such kind.
    """
    name, _, rest = text.partition("=")
    kind, _, column = rest.partition(":")
    if kind not in (*KINDS, VALUES):
        raise ConfigError(
            f"unknown kind of modality '{kind}'", where=f"--modality {text}", fix=did_you_mean(kind, [*KINDS, VALUES])
        )
    columns = tuple(column.split(",")) if kind == VALUES else (column,)
    return _checked(Source(name, kind, columns), f"--modality {text}", "write NAME=KIND:COLUMN")


def _checked(source: Source, where: str, form: str) -> Source:
    if not NAME.fullmatch(source.name) or not all(source.columns):
        raise ConfigError(
            "no modality's name and columns can be read",
            where=where,
            fix=f"{form}; a name has letters, digits, - and _",
        )
    return source


def with_prefixes(sources: Sequence[Source]) -> list[Source]:
    """Give a prefix to each source that is not the only one of its kind and named like it.

    Raises:
        ConfigError: If there is no source, or two have one name (case apart: readers of shards lower it).
    """
    if not sources:
        raise ConfigError("no modality is given", fix="use --image, --text, --audio, --array, --values or --modality")
    names = Counter(source.name.lower() for source in sources)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"two modalities are named '{twice[0]}'", fix="name each: --modality NAME=KIND:COLUMN")
    kinds = Counter(source.stored_kind for source in sources)
    plain = {source.name for source in sources if source.name == source.stored_kind and kinds[source.stored_kind] == 1}
    return [source if source.name in plain else replace(source, prefix=f"{source.name.lower()}.") for source in sources]
