"""open_clip's own tokenizer gives its own tokens, also of texts that are cut before it sees them, and in bounded time."""

from __future__ import annotations

import json
import random
import string
import time

import open_clip
import pytest
import torch

from mmrep.encoders.open_clip import OpenClipTokenizer

RANDOM = random.Random(0)
LETTERS = "".join(RANDOM.choices(string.ascii_lowercase, k=16_000))


@pytest.fixture(scope="module", params=[16, 77])
def length(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "",
        " ".join("".join(RANDOM.choices(string.ascii_lowercase, k=RANDOM.randint(1, 12))) for _ in range(2000)),
        "blackandwhitephotography " * 500,
        "thinkbigsundaywithmarsha\n\n" * 500,
        " \t\n" * 5000 + "a dog on a beach",
        "a dog" + " " * 10_000 + "on a beach",
        "犬が走る。" * 2000,
        "👩‍🚀 &amp; cafÃ© " * 2000,
        "!?" * 5000,
        "2026" * 2000,
        LETTERS[:5000],
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_cut_text_has_the_same_tokens(text: str, length: int) -> None:
    config = {"context_length": length, "vocab_size": 49408}
    expected = open_clip.SimpleTokenizer(context_length=length)(text)[0]
    assert torch.equal(OpenClipTokenizer(json.dumps(config))(text), expected)


def test_a_long_word_takes_no_time() -> None:
    tokenizer = OpenClipTokenizer(json.dumps({"context_length": 77, "vocab_size": 49408}))
    tokenizer("a")  # reads the vocabulary
    began = time.process_time()
    assert int((tokenizer(LETTERS) > 0).sum()) == 77
    assert time.process_time() - began < 3  # 12 s uncut
