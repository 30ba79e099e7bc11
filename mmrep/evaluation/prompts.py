"""Class names and prompt templates: from files, and from both to the prompts of each class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrep.errors import ConfigError, did_you_mean
from mmrep.evaluation.templates import TEMPLATES

CLASS = "{c}"
"""What stands for the class in a template."""
MOST_FILE_BYTES = 64 << 20

Templates = list[str] | dict[str, list[str]]
"""Templates for all classes, or for each class the prompts themselves (as CuPL's, Pratt et al. 2023)."""


def prompts_of(classes: Sequence[str], templates: Templates) -> list[list[str]]:
    """The prompts of each class, in order.

    Raises:
        ConfigError: If there is no template, one lacks ``{c}``, or a class has no prompt of its own.
    """
    if isinstance(templates, dict):
        if missing := [name for name in classes if not templates.get(name)]:
            raise ConfigError(f"{len(missing)} classes have no prompt, the first is '{missing[0]}'")
        return [templates[name] for name in classes]
    if not templates:
        raise ConfigError("there is no prompt template", fix="give --templates FILE or --language")
    if odd := [template for template in templates if CLASS not in template]:
        raise ConfigError(f"template '{odd[0]}' has no {CLASS}", fix=f"write {CLASS} where the class goes")
    # Not str.format, which reads attributes of objects: a template is data.
    return [[template.replace(CLASS, name) for template in templates] for name in classes]


def shipped_templates(language: str) -> list[str]:
    """The templates of a language that come with mmrep.

    Raises:
        ConfigError: If there are none.
    """
    if language not in TEMPLATES:
        raise ConfigError(
            f"no templates for the language '{language}'",
            fix=f"{did_you_mean(language, TEMPLATES)}, or give --templates",
        )
    return TEMPLATES[language]


def read_templates(path: Path, classes: Sequence[str], keys: Sequence[str]) -> Templates:
    """Templates of a file: a line each, or as JSON.

    Args:
        path: Text, or JSON: a list, ``{class: [prompt, ...]}``, or one of these under one of ``keys``.
        classes: The names of all classes.
        keys: Data set, label or language, the preferred first: CLIP_benchmark's files hold those of many.

    Raises:
        ConfigError: If the file is missing, broken, or has none of the keys.
    """
    return as_templates(read_names_or_json(path), classes, keys, path)


def as_templates(content: Any, classes: Sequence[str], keys: Sequence[str], where: object) -> Templates:
    """What a file of templates held: see `read_templates`."""
    content = _under_key(content, keys, where) if not _is_per_class(content, classes) else content
    if _is_per_class(content, classes):
        return {name: _strings(content[name], where) for name in classes}
    return _strings(content, where)


def read_classnames(path: Path, keys: Sequence[str]) -> list[str]:
    """Names of classes of a file, in order: a line each, or JSON, a list or one under one of ``keys``.

    Raises:
        ConfigError: If the file is missing, broken, or has none of the keys.
    """
    return _strings(_under_key(read_names_or_json(path), keys, path), path)


def read_names_or_json(path: Path) -> Any:
    """The stripped lines of a text file, or what a JSON file holds.

    Raises:
        ConfigError: If it is missing, larger than 64 MiB, or broken.
    """
    if not path.is_file():
        raise ConfigError("no such file", where=path)
    if path.stat().st_size > MOST_FILE_BYTES:
        raise ConfigError(f"a file of {path.stat().st_size} bytes", where=path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json" or (text.lstrip()[:1] in ("{", "[") and _is_json(text)):
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"broken file ({error})", where=path) from error
    return [line.strip() for line in text.splitlines()]


def _is_json(text: str) -> bool:
    """A first line as "{c} in the snow" is text."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_per_class(content: Any, classes: Sequence[str]) -> bool:
    return isinstance(content, dict) and bool(classes) and set(classes) <= content.keys()


def _under_key(content: Any, keys: Sequence[str], where: object) -> Any:
    if not isinstance(content, dict):
        return content
    for key in keys:
        if key in content:
            return content[key]
    raise ConfigError(
        f"the file has neither all classes nor {' nor '.join(map(repr, keys))}",
        where=where,
        fix=did_you_mean(keys[0], content) if keys else None,
    )


def _strings(content: Any, where: object) -> list[str]:
    if not isinstance(content, list) or not content or not all(isinstance(item, str) for item in content):
        raise ConfigError("what should be a list of texts is none", where=where)
    return content


def only_of(mapping: Mapping[str, Any], what: str, chosen: str | None, where: object) -> str:
    """The chosen key of a mapping, or its only one.

    Raises:
        ConfigError: If it lacks the key, or none is chosen of several.
    """
    if chosen is None and len(mapping) == 1:
        return next(iter(mapping))
    if chosen is None:
        raise ConfigError(f"which {what}? there are: {', '.join(mapping) or 'none'}", where=where, fix=f"give --{what}")
    if chosen not in mapping:
        raise ConfigError(f"no {what} '{chosen}'", where=where, fix=did_you_mean(chosen, mapping))
    return chosen
