"""Emoji pictures: what is held out, and what the command does with a folder that holds something."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import emoji_pictures
from data_prep.emoji_m3 import sources
from data_prep.emoji_m3.catalog import Emoji
from data_prep.emoji_m3.settings import TEST_VENDORS, VENDORS
from mmrep.data.index import Index
from mmrep.data.reader import Samples
from tests.tiny import file_bytes

for module in sources.PYTHON_PACKAGES:
    pytest.importorskip(module, reason="pip install 'mmrep[emoji-m3]'")


def test_emoji_are_split_and_the_vendor_is_held_out() -> None:
    emoji = [
        Emoji("x", f"{0x1F600 + i:x}", f"e{i}", "g", "s", {"en": f"e{i}"}, {}, VENDORS[:3] if i % 5 == 0 else VENDORS)
        for i in range(400)
    ]
    plans = {split: emoji_pictures.plan(emoji, split) for split in emoji_pictures.SPLITS}
    shown = {split: {one.code for _, one, _ in samples} for split, samples in plans.items()}
    assert not shown["train"] & shown["val"] and not (shown["train"] | shown["val"]) & shown["test"]
    assert shown["test_vendor"] <= shown["test"] and 0.6 < len(shown["train"]) / 400 < 0.8
    vendors = {split: {vendor for _, _, vendor in samples} for split, samples in plans.items()}
    assert vendors["test_vendor"] == set(TEST_VENDORS) and not vendors["train"] & set(TEST_VENDORS)
    assert all(emoji[label] is one and vendor in one.vendors for label, one, vendor in plans["train"])


def test_build_gives_shards_that_the_reader_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures"
    assert emoji_pictures.main(["--out", str(out)]) == 0
    index = Index.load(out)
    assert set(index.splits) == set(emoji_pictures.SPLITS) and set(index.modalities) == {"image"}
    assert len(index.labels["group"].classes) == 8 and len(index.labels["label"].classes) == 1366
    assert all(index.licences[vendor] for vendor in VENDORS)
    assert len(Samples(index, "train")) > 3000 and len(Samples(index, "test_vendor")) > 200
    before = file_bytes(out)
    assert emoji_pictures.main(["--out", str(out)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert emoji_pictures.main(["--out", str(out), "--overwrite"]) == 0
    assert file_bytes(out) == before
