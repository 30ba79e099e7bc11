"""Which sample is what: a pure function of the settings, the emoji and the shard's name. Nothing is drawn or spoken here.

- plain: one emoji; the text is its name (in training sometimes its keywords), the audio its name, in the same or another
  language.
- joint: L languages; the text is L names of L different emoji, one per language, in random order; the audio is the name
  of an unrelated emoji, spoken in one of the languages; the picture is the emoji named in that language. Each text comes
  L times in a row, asked for in each language once: text alone leaves L pictures equally likely, even to a model that
  has learned the training texts by heart. Audio alone tells a language and nothing of the picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from data_prep.emoji_m3.catalog import Emoji, unambiguous
from data_prep.emoji_m3.settings import SPLITS, Settings

KEYWORD_SHARE, MOST_KEYWORDS = 0.4, 4
SAME_LANGUAGE_SHARE = 0.5
SEPARATOR = " | "
RATES, PITCHES = (145, 205), (35, 65)  # words/min; espeak-ng's 0 to 99


@dataclass(frozen=True)
class Sample:
    """One sample before it is drawn and spoken.

    Args:
        emoji: The emoji of the picture.
        words: (language, words) of the text, in its order.
        spoken: What the voice says, in ``audio_lang``.
        rate: Words per minute.
        pitch: espeak-ng's pitch, from 0 to 99.
    """

    emoji: Emoji
    words: tuple[tuple[str, str], ...]
    spoken: str
    audio_lang: str
    vendor: str
    voice: str
    rate: int
    pitch: int

    @property
    def text(self) -> str:
        return SEPARATOR.join(words for _, words in self.words)

    @property
    def text_lang(self) -> str:
        return SEPARATOR.join(language for language, _ in self.words)


def plan_shard(settings: Settings, emoji: Sequence[Emoji], task: str, split: str, shard: int) -> list[Sample]:
    """The samples of one shard, in order."""
    rng = Random(f"emoji-m3/{settings.seed}/{task}/{split}/{shard}")
    count = settings.shard_sizes(task, split)[shard]
    if task == "plain":
        return [_plain(rng, settings, emoji, split) for _ in range(count)]
    pool = unambiguous(emoji, settings.joint_languages)
    samples: list[Sample] = []
    while len(samples) < count:
        samples += _joint(rng, settings, pool, split)
    return samples[:count]


def _plain(rng: Random, settings: Settings, emoji: Sequence[Emoji], split: str) -> Sample:
    shown = rng.choice(emoji)
    languages = [language for language in settings.plain_languages if language in shown.names]
    text_lang = rng.choice(languages)
    audio_lang = text_lang if rng.random() < SAME_LANGUAGE_SHARE else rng.choice(languages)
    words, keywords = shown.names[text_lang], shown.keywords[text_lang]
    if split == "train" and keywords and rng.random() < KEYWORD_SHARE:
        words = ", ".join(rng.sample(keywords, rng.randint(1, min(MOST_KEYWORDS, len(keywords)))))
    return _finish(rng, split, shown, ((text_lang, words),), shown.names[audio_lang], audio_lang)


def _joint(rng: Random, settings: Settings, pool: Sequence[Emoji], split: str) -> list[Sample]:
    """One text, asked for in each of its languages."""
    languages = settings.joint_languages
    named = rng.sample(pool, len(languages))
    while tuple_split(named, settings.seed) != SPLITS[split].tuples:
        named = rng.sample(pool, len(languages))
    words = [(language, emoji.names[language]) for language, emoji in zip(languages, named, strict=True)]
    rng.shuffle(words)
    others = [emoji for emoji in pool if emoji not in named]
    return [
        _finish(rng, split, shown, tuple(words), rng.choice(others).names[language], language)
        for language, shown in zip(languages, named, strict=True)
    ]


def tuple_split(named: Sequence[Emoji], seed: int) -> str:
    """Which share the emoji named in a text belong to: 70 % train, 10 % val, 20 % test.

    By the set of emoji, so that a test text's emoji never met in training, in whichever languages they were named.
    """
    codes = " ".join(sorted(emoji.code for emoji in named))
    percent = int.from_bytes(hashlib.sha256(f"{seed}/{codes}".encode()).digest()[:8]) % 100
    return "train" if percent < 70 else "val" if percent < 80 else "test"


def _finish(
    rng: Random, split: str, shown: Emoji, words: tuple[tuple[str, str], ...], spoken: str, audio_lang: str
) -> Sample:
    """Adds who draws and who speaks."""
    vendor = rng.choice([vendor for vendor in SPLITS[split].vendors if vendor in shown.vendors])
    voice = rng.choice(SPLITS[split].voices)
    return Sample(shown, words, spoken, audio_lang, vendor, voice, rng.randint(*RATES), rng.randint(*PITCHES))
