"""The errors that a user of mmrep can cause and mend.

Each says what is wrong, where, and what to do, in one line; the command line prints that line and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class MmrepError(Exception):
    """Base of all errors that mmrep raises on purpose.

    Args:
        what: What is wrong.
        where: The file, shard, key or config path at fault.
        fix: What the user can do about it.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f" [{where}]" if where is not None else ""
        advice = f"; {fix}" if fix else ""
        super().__init__(f"{what}{place}{advice}")

    def happened_at(self, place: object) -> None:
        """Say where, if that has not been said."""
        if self.where is None:
            MmrepError.__init__(self, self.what, where=place, fix=self.fix)

    def __reduce__(self) -> tuple[Any, ...]:
        """So that a worker process can hand the error over as it is."""
        state = {name: value for name, value in self.__dict__.items() if not name.startswith("__")}
        return _restore, (type(self), {**state, "where": None if self.where is None else str(self.where)})


def _restore(kind: type[MmrepError], state: dict[str, Any]) -> MmrepError:
    error = kind(state["what"], where=state["where"], fix=state["fix"])
    error.__dict__.update(state)
    return error


class ConfigError(MmrepError):
    """A setting that is misspelt, impossible, or contradicts another."""


class DataError(MmrepError):
    """Shards, an index or a sample that cannot be used."""


class SampleError(DataError):
    """A sample whose contents cannot be used, now or ever: another may take its place.

    Args:
        what, where, fix: As for all errors.
        reason: A word to count by: ``checksum``, ``undecodable``, ``too large``.

    Attributes:
        modality: Whose member is at fault, once that is known.
    """

    def __init__(self, what: str, *, where: object = None, fix: str | None = None, reason: str = "undecodable") -> None:
        super().__init__(what, where=where, fix=fix)
        self.reason = reason
        self.modality = ""


@dataclass(frozen=True)
class Fault:
    """The record of a `SampleError`: a sample that could not be used.

    Attributes:
        shard: Its shard's name.
        sha256: That shard's digest, where it is indexed: two datasets may name their shards alike.
        key: Its key.
        modality: Whose member is at fault.
        reason: A word to count by.
        detail: The whole message.
    """

    shard: str
    sha256: str
    key: str
    modality: str
    reason: str
    detail: str


class CheckpointError(MmrepError):
    """A checkpoint or model folder that is broken, unsafe, or made by another configuration."""


class LossError(MmrepError):
    """Embeddings that a loss cannot take, or a case that it cannot score."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Advice that names the nearest known word, or all of them when none is near."""
    words = list(known)
    near = difflib.get_close_matches(wrong, words, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(words) or 'nothing is known here'}"


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Refuse a setting that is none of its few values.

    Raises:
        ConfigError: With the nearest of them.
    """
    choices = list(known)
    if value not in choices:
        raise ConfigError(f"{name}={value!r}", fix=did_you_mean(str(value), choices))
