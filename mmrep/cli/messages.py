"""What the config parser says, put into one line with the nearest right word."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

from mmrep.errors import did_you_mean

UNKNOWN = (
    r"[Kk]ey '([\w.+]+)' is not expected",
    r"[Oo]ption '([\w.+]+)' is not accepted",
    r"does not accept (?:nested key|option) '([\w.+]+)'",
    r"[Uu]nrecognized arguments: --([\w.+]+)",
)
NO_CLASS = (
    r"(?:class_path|import path string|Import path|[Nn]ot accessible or invalid|has no attribute|No module named)"
)
OURS = re.compile(r"(?:[\w.]+: )?(?:unknown key|no class) '[^']+'; (?:did you mean '[^']+'\?|choose from: [\w., ]+)")
CLASS_PATH = re.compile(r"class_path['\"]?[:=]? ?['\"]?([\w.]+)")


def explain(message: str, parser: Any) -> str:
    """One line from jsonargparse's many.

    Args:
        message: What jsonargparse says; it quotes what an inner parser said, which may have come from here.
        parser: The parser that says it, whose keys are suggested.
    """
    if inner := OURS.search(message):
        return inner[0]
    for pattern in UNKNOWN:
        if match := re.search(pattern, message):
            nearest = did_you_mean(*_candidates(message, match[1], parser))
            return f"{_place(message)}unknown key '{match[1]}'; {nearest}"
    if re.search(NO_CLASS, message) and (wrong := _wrong_class(message)):
        return f"{_place(message)}no class '{wrong}'; {did_you_mean(wrong.rsplit('.', 1)[-1], _classes())}"
    return _essence(message)


def _essence(message: str) -> str:
    """The message without the alternatives that nobody meant."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
    kept = [line for line in lines if line and not line.startswith(noise)]
    text = " ".join(kept).replace("Does not validate against any of the Union subtypes", "").strip()
    return text if len(text) < 400 else text[:400] + " ..."


def _place(message: str) -> str:
    keys = re.findall(r"[Pp]arser key \"([\w.]+)\"", message)
    return f"{keys[-1]}: " if keys else ""


def _wrong_class(message: str) -> str | None:
    """The first class that the message names and that cannot be imported."""
    for path in re.findall(r"[\w.]+", message):
        module, dot, name = path.rpartition(".")
        if not name[:1].isupper():
            continue
        like_ours = did_you_mean(name, _classes()).startswith("did you mean") and name not in _classes()
        if like_ours if not dot else module.startswith("mmrep") and not _importable(module, name):
            return str(path)
    return None


def _importable(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except (ImportError, ValueError):
        return False


def _candidates(message: str, wrong: str, parser: Any) -> tuple[str, Iterable[str]]:
    """The part of a dotted key that is wrong, and the words that could stand there."""
    known = _known(message, wrong, parser)
    if known:
        return wrong.rsplit(".", 1)[-1], known
    return wrong.partition(".")[0], _heads(_all_keys(parser))


def _known(message: str, wrong: str, parser: Any) -> list[str]:
    """Keys that could have been meant: the parameters of the last class that the message names, or the parser's own."""
    for path in reversed(CLASS_PATH.findall(message)):
        module, _, name = path.rpartition(".")
        try:
            return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        except (ImportError, AttributeError, ValueError):
            continue
    prefix = wrong.rpartition(".")[0]
    keys = _all_keys(parser)
    return [key.removeprefix(f"{prefix}.") for key in keys if key.startswith(f"{prefix}.")] if prefix else _heads(keys)


def _heads(keys: Iterable[str]) -> list[str]:
    return sorted({key.partition(".")[0] for key in keys} - {"help", "print_config"})


def _subparsers(parser: Any) -> list[Any]:
    return [sub for action in parser._actions if isinstance(action.choices, dict) for sub in action.choices.values()]


def _all_keys(parser: Any) -> list[str]:
    return sorted({action.dest for each in (parser, *_subparsers(parser)) for action in each._actions})


def _classes() -> list[str]:
    import mmrep.encoders
    import mmrep.modules

    bases = {"Encoder", "ContrastiveModule"}
    return [name for room in (mmrep.encoders, mmrep.modules) for name in room.__all__ if name not in bases]
