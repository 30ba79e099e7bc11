"""docs/datasets.md: its commands are those of the readers, its files exist, its recipe for a pickle works."""

from __future__ import annotations

import csv
import importlib
import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from data_prep import table
from data_prep.release_command import make_parser
from mmrep.data.decode import decode
from mmrep.data.index import Index
from mmrep.data.reader import Samples

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "datasets.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    python -m data_prep.") and " --" in line]


@pytest.mark.parametrize("line", COMMANDS, ids=range(len(COMMANDS)))
def test_options_of_the_page_are_known(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` of the module has every option that the page gives it."""
    words = shlex.split(line.replace("[", " ").replace("]", " ").rstrip("\\"))
    module = importlib.import_module(words[2])
    with pytest.raises(SystemExit):
        module.main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known


def test_files_that_the_page_names_exist() -> None:
    for name in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / name).resolve().exists(), name
    for name in re.findall(r"configs/[a-z_0-9]+/[a-z_]+\.yaml", PAGE):
        assert (ROOT / name).is_file(), name
    shared = {action.dest.replace("_", "-") for action in make_parser("x", "x")._actions} - {"help"}
    assert all(f"--{option}" in PAGE for option in shared)


def test_recipe_for_a_pickle_gives_a_table_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the shape of MMSA's, which the test made itself."""
    monkeypatch.chdir(tmp_path)
    split = {
        "id": np.array(["a$_$0", "b$_$1"]),
        "raw_text": np.array(["so, good", "bad"]),
        "regression_labels": np.array([1.5, -2.0], dtype=np.float32),
    }
    split |= {name: np.full((2, 50, size), size) for name, size in (("text", 768), ("audio", 74), ("vision", 35))}
    Path("aligned_50.pkl").write_bytes(pickle.dumps({"train": split, "valid": split, "test": split}))
    (recipe,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(recipe, "recipe", "exec"), {})
    assert len(list(csv.reader(Path("mosei_table/table.csv").read_text().splitlines()))) == 7
    (command,) = re.findall(r"python -m data_prep\.table (.*?--group-key id)", PAGE, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert importlib.import_module("data_prep.table.command").main(words) == 0 and table is not None
    index = Index.load("data/mosei_aligned")
    assert {name: len(Samples(index, name)) for name in index.splits} == {"train": 2, "val": 2, "test": 2}
    samples = Samples(index, "test")
    bert = decode("array", "bert.npy", samples.read(0, "bert.npy"), "")
    assert bert.shape == (768, 50) and index.modalities["facet"].kind == "array"
    assert {json.loads(samples.read(n, "json"))["id"] for n in range(2)} == {"a$_$0", "b$_$1"}
