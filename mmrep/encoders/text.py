"""Text encoders: a small one that trains on a CPU and knows any script, and open_clip's towers."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.encoders.base import Encoder
from mmrep.encoders.open_clip import create_towers, output_width
from mmrep.errors import ConfigError


@dataclass(frozen=True)
class HashedNgrams:
    """Text to the numbers of its character n-grams, hashed: no vocabulary, any language.

    Args:
        buckets: n-grams fall into the numbers 1 to ``buckets - 1``; 0 is padding.
        length: Numbers per text; what is beyond is cut.
        longest: Of the n-grams, which start at 1.
        drop: Share of them that is left out at random.
    """

    buckets: int
    length: int
    longest: int
    drop: float = 0.0

    def __call__(self, text: str) -> Tensor:
        grams = self._ngrams(text)
        if self.drop:
            kept = (torch.rand(len(grams)) >= self.drop).tolist()
            grams = [gram for gram, keep in zip(grams, kept, strict=True) if keep] or grams[:1]
        numbers = [1 + zlib.crc32(gram.encode()) % (self.buckets - 1) for gram in grams][: self.length]
        return torch.tensor(numbers + [0] * (self.length - len(numbers)), dtype=torch.int32)

    def _ngrams(self, text: str) -> list[str]:
        # Whole words first: where a long text is cut, it loses its letter groups before its words.
        words = [f"<{word}>" for word in unicodedata.normalize("NFKC", text).casefold().split()] or ["<>"]
        sizes = range(self.longest, 0, -1)
        return words + [
            word[i : i + n] for n in sizes for word in words for i in range(len(word) - n + 1) if len(word) > n
        ]


class NgramTextEncoder(Encoder):
    """The mean of learned vectors of a text's character n-grams (as fastText: Bojanowski et al. 2017), blind to order.

    Args:
        embed_dim: Width of the embedding space.
        width: Width of the vectors.
        buckets: Size of the hash table.
        length: At most so many n-grams of a text are taken.
        longest: Longest n-gram, in characters.
        drop: Share of the words and n-grams that training leaves out at random.
        **head: ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    kind = "text"

    def __init__(
        self,
        embed_dim: int,
        width: int = 128,
        buckets: int = 16384,
        length: int = 192,
        longest: int = 4,
        drop: float = 0.0,
        **head: Any,
    ) -> None:
        if not 0 <= drop < 1:
            raise ConfigError(f"drop={drop} must be at least 0 and below 1")
        settings = {"width": width, "buckets": buckets, "length": length, "longest": longest, "drop": drop}
        super().__init__(embed_dim, width, settings, **head)
        self.ngrams, self.drop = HashedNgrams(buckets, length, longest), drop
        self.vectors = nn.Embedding(buckets, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return replace(self.ngrams, drop=self.drop if train else 0.0)

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.ngrams.length, dtype=torch.int32)

    def features(self, inputs: Tensor) -> Tensor:
        bag = F.embedding_bag(inputs, self.vectors.weight, mode="mean", padding_idx=0)
        features: Tensor = self.norm(bag)
        return features


@dataclass(frozen=True)
class OpenClipTokenizer:
    """Text to open_clip's token numbers ``[context_length]``. Holds names only, so that it travels to workers."""

    architecture: str

    def __call__(self, text: str) -> Tensor:
        tokens: Tensor = _tokenizer(self.architecture)(text)[0]
        return tokens


class OpenClipTextEncoder(Encoder):
    """The text tower of an open_clip architecture with its tokenizer, with random weights.

    Args:
        embed_dim: Width of the embedding space; a linear head leads from the tower's output to it.
        architecture: A name that ``open_clip.list_models()`` gives.
        **head: ``batch_norm``, ``head_width``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    kind = "text"

    def __init__(self, embed_dim: int, architecture: str = "ViT-B-32", **head: Any) -> None:
        tower = create_towers(architecture).text
        super().__init__(embed_dim, output_width(tower), {"architecture": architecture}, **head)
        self.tower = tower

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return OpenClipTokenizer(self.settings["architecture"])

    def empty(self, n: int) -> Tensor:
        return torch.zeros(n, self.tower.context_length, dtype=torch.int64)

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower(inputs)
        return features


_TOKENIZERS: dict[str, Any] = {}


def _tokenizer(architecture: str) -> Any:
    """open_clip's tokenizer, made once per process: its vocabulary takes a second to unpack."""
    if architecture not in _TOKENIZERS:
        import open_clip

        _TOKENIZERS[architecture] = open_clip.get_tokenizer(architecture)
    return _TOKENIZERS[architecture]
