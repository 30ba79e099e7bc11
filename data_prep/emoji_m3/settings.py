"""What Emoji-M3 is: its sizes, its languages, and what each split holds out."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("plain", "joint")

# CLDR languages that name at least 1,365 of the 1,366 core emoji and have an espeak-ng voice that reads them.
# Faroese (its dictionary is not in the package) and Cherokee are left out: their voices stay silent.
# fmt: off
ALL_LANGUAGES = (
    "af", "am", "ar", "as", "az", "be", "bg", "bn", "bs", "ca", "cs", "cv", "cy", "da", "de", "el", "en",
    "es", "et", "eu", "fa", "fi", "fr", "ga", "gd", "gu", "he", "hi", "hr", "hu", "hy", "id", "is", "it",
    "ja", "ka", "kk", "kn", "ko", "kok", "ky", "lt", "lv", "mk", "ml", "mr", "ms", "my", "ne", "nl", "no", "or",
    "pa", "pl", "pt", "ro", "ru", "sd", "si", "sk", "sl", "sq", "sr", "sv", "sw", "ta", "te", "th", "ti", "tk",
    "tr", "uk", "ur", "uz", "vi", "yue", "zh",
)
# fmt: on

TRAIN_VENDORS = ("noto", "noto-v1", "twemoji", "emojione")
TEST_VENDORS = ("fluent-emoji-flat",)
HARD_VENDORS = ("fluent-emoji-high-contrast",)
VENDORS = TRAIN_VENDORS + TEST_VENDORS + HARD_VENDORS

# fmt: off
TRAIN_VOICES = (
    "f1", "f2", "f3", "Annie", "belinda", "steph", "m1", "m2", "m3",
    "Andy", "adam", "klatt4", "m7", "Michael", "grandma", "Diogo",
)
# fmt: on
VAL_VOICES = ("f5", "m4")
TEST_VOICES = ("linda", "Mike", "Reed", "anika")


@dataclass(frozen=True)
class Split:
    """Who draws and who speaks in a split, and which share of the joint task's emoji tuples it uses."""

    vendors: tuple[str, ...]
    voices: tuple[str, ...]
    tuples: str


SPLITS = {
    "train": Split(TRAIN_VENDORS, TRAIN_VOICES, "train"),
    "val": Split(TRAIN_VENDORS, VAL_VOICES, "val"),
    "test_voice": Split(TRAIN_VENDORS, TEST_VOICES, "test"),
    "test_vendor": Split(TEST_VENDORS, TRAIN_VOICES, "test"),
    "test_both": Split(TEST_VENDORS, TEST_VOICES, "test"),
    "test_hard": Split(HARD_VENDORS, TEST_VOICES, "test"),
}


@dataclass(frozen=True)
class Settings:
    """One size of the dataset; every byte of a build follows from it.

    Args:
        name: What the build is called in the index.
        emoji: How many emoji; None takes the whole core.
        easy: Keep only emoji that every vendor draws and whose names have at most two words in each joint language.
        joint_languages, plain_languages: CLDR codes; the joint text has one name per joint language.
        joint_train, joint_val, joint_test: Samples of the joint task; ``joint_test`` is the size of each test set.
        plain_train, plain_val, plain_test: The same for the plain task.
        shard_samples: Samples in a shard; the last one of a split may have fewer.
        seed: Chooses the emoji and every sample.
    """

    name: str
    emoji: int | None
    easy: bool
    joint_languages: tuple[str, ...]
    plain_languages: tuple[str, ...]
    joint_train: int
    joint_val: int
    joint_test: int
    plain_train: int
    plain_val: int
    plain_test: int
    shard_samples: int
    seed: int = 0

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(sorted({*self.joint_languages, *self.plain_languages}))

    def samples(self, task: str, split: str) -> int:
        """Samples of a split of a task."""
        return int(getattr(self, f"{task}_{SPLITS[split].tuples}"))

    def shard_sizes(self, task: str, split: str) -> list[int]:
        """Samples of each shard of a split, in shard order."""
        total, size = self.samples(task, split), self.shard_samples
        return [min(size, total - start) for start in range(0, total, size)]


MINI = Settings(
    name="mini",
    emoji=64,
    easy=True,
    joint_languages=("en", "es"),
    plain_languages=("en", "es", "de", "fr", "ru", "el", "hi", "zh"),
    joint_train=24_000,
    joint_val=512,
    joint_test=1_024,
    plain_train=6_000,
    plain_val=512,
    plain_test=1_024,
    shard_samples=512,
)

FULL = Settings(
    name="full",
    emoji=None,
    easy=False,
    joint_languages=("en", "es", "de", "fr", "ru"),
    plain_languages=ALL_LANGUAGES,
    joint_train=200_000,
    joint_val=4_096,
    joint_test=8_192,
    plain_train=150_000,
    plain_val=4_096,
    plain_test=8_192,
    shard_samples=2_048,
)

SIZES = {"mini": MINI, "full": FULL}
