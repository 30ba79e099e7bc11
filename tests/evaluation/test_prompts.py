"""Templates and class names: what files may hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmrep.errors import ConfigError
from mmrep.evaluation.prompts import only_of, prompts_of, read_classnames, read_templates, shipped_templates
from mmrep.evaluation.templates import TEMPLATES

CLASSES = ["cat", "dog"]


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_prompts() -> None:
    assert prompts_of(CLASSES, ["a {c}", "{c}!"]) == [["a cat", "cat!"], ["a dog", "dog!"]]
    assert prompts_of(CLASSES, {"dog": ["it barks"], "cat": ["x", "y"]}) == [["x", "y"], ["it barks"]]
    assert prompts_of(["{c}"], ["{c.__class__} {c}"]) == [["{c.__class__} {c}"]], "a template is data, never evaluated"


@pytest.mark.parametrize(
    ("templates", "message"),
    [([], "no prompt template"), (["a photo"], "has no {c}"), ({"cat": ["x"]}, "1 classes have no prompt.*'dog'")],
)
def test_impossible_templates(templates: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prompts_of(CLASSES, templates)


def test_every_shipped_template_has_its_place() -> None:
    assert {"en", "de", "es", "fr", "ru", "el", "hi", "zh"} <= TEMPLATES.keys()
    for language, templates in TEMPLATES.items():
        assert prompts_of(CLASSES, templates) and shipped_templates(language) == templates
    with pytest.raises(ConfigError, match=r"language 'eng'.*'en'"):
        shipped_templates("eng")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.txt", " a {c} \n{c} in snow\n", ["a {c}", "{c} in snow"]),
        ("t.txt", "{c} in the snow\n", ["{c} in the snow"]),
        ("t.json", ["a {c}"], ["a {c}"]),
        ("t.json", {"cat": ["x"], "dog": ["y"], "cow": ["z"]}, {"cat": ["x"], "dog": ["y"]}),
        ("t.json", {"en": ["a {c}"], "de": ["ein {c}"]}, ["ein {c}"]),
        ("t.json", {"pets": {"cat": ["x"], "dog": ["y"]}}, {"cat": ["x"], "dog": ["y"]}),
        ("t.txt", json.dumps({"cat": ["x"], "dog": ["y"]}), {"cat": ["x"], "dog": ["y"]}),
    ],
)
def test_files_of_templates(tmp_path: Path, name: str, content: Any, expected: Any) -> None:
    assert read_templates(written(tmp_path / name, content), CLASSES, ["de", "pets", "en"]) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", "{", "broken file"),
        ("t.json", {"fr": ["{c}"]}, "neither all classes nor 'de'"),
        ("t.json", {"de": [1]}, "list of texts"),
        ("t.json", [], "list of texts"),
        ("t.json", "[" * 100_000, "broken file"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_templates(written(tmp_path / name, content), CLASSES, ["de"])
    with pytest.raises(ConfigError, match=r"no such file"):
        read_templates(tmp_path / "nothing.txt", CLASSES, ["de"])


def test_class_names(tmp_path: Path) -> None:
    assert read_classnames(written(tmp_path / "c.txt", "Katze\nHund\n"), ["de"]) == ["Katze", "Hund"]
    assert read_classnames(written(tmp_path / "c.json", {"de": ["Katze"], "en": ["cat"]}), ["de"]) == ["Katze"]


def test_the_only_one_need_not_be_named() -> None:
    assert only_of({"a": 1}, "label", None, "d") == "a" and only_of({"a": 1, "b": 2}, "label", "b", "d") == "b"
    with pytest.raises(ConfigError, match=r"which label.*a, b.*--label"):
        only_of({"a": 1, "b": 2}, "label", None, "d")
    with pytest.raises(ConfigError, match=r"no label 'lable'.*'label'"):
        only_of({"label": 1}, "label", "lable", "d")
