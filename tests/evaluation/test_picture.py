"""The picture of queries with their best answers, of captions as they come."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from mmrep.data.build import build_index
from mmrep.data.reader import Samples
from mmrep.data.writer import write_shard
from mmrep.errors import ConfigError
from mmrep.evaluation.report import check_drawing, draw_examples
from mmrep.evaluation.retrieval import Direction
from mmrep.evaluation.zero_shot import Split
from tests.search.conftest import small
from tests.tiny import MODALITIES, sample

CAPTIONS = (r"$\nope$", "from $5 to $9 | _x^{", "red \x1b[31m\x07 thing", "word " * 50_000)


def test_captions_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Not as formulas, not with the controls of a terminal, and no more of them than there is room for."""
    samples = [sample(f"k{n}", n) | {"txt": caption} for n, caption in enumerate(CAPTIONS)]
    write_shard(tmp_path / "test-0.tar", samples)
    (index := build_index(tmp_path, MODALITIES)).save()
    model = small()
    embeddings = Split(index, "test", 4).embed(model, model.by_modality)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of characters that the font lacks
        for name in ("picture.png", "bare"):
            direction = Direction(("text",), "image")
            draw_examples(tmp_path / "new" / name, embeddings, model, Samples(index, "test"), direction)
    assert all(min(Image.open(tmp_path / "new" / name).size) > 300 for name in ("picture.png", "bare"))


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    check_drawing(tmp_path / "a.PDF")
    with pytest.raises(ConfigError, match=r"no picture is written as '.txt' .*a\.txt"):
        check_drawing(tmp_path / "a.txt")
