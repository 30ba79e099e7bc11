"""Text encoders: a small one that trains on a CPU and knows any script, and open_clip's towers."""

from __future__ import annotations

import json
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.encoders.base import Encoder
from mmrep.encoders.layers import tower_layers
from mmrep.encoders.open_clip import (
    OpenClipTokenizer,
    find_source,
    half_config,
    load_pretrained,
    text_files,
    text_tower,
)
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


class OpenClipTextEncoder(Encoder):
    """The text tower of a model of open_clip's with its tokenizer: its own or Hugging Face's, random or pretrained weights.

    Args:
        embed_dim: Width of the embedding space; a linear head leads from the tower's output to it, and with ``projection:
            false`` the tower's output is the embedding.
        architecture: A name that ``open_clip.list_models()`` gives, by default ViT-B-32; or a config as under ``model_cfg``.
        pretrained: A tag of the architecture, ``local-dir:DIR`` or ``hf-hub:ORG/REPO``; null for random weights. A model that
            is loaded again does not need it.
        files: The tokenizer's, as a model folder keeps them.
        **head: ``batch_norm``, ``head_width``, ``projection``, ``lora``, ``views``: see `mmrep.encoders.base.Encoder`.
    """

    kind = "text"

    def __init__(
        self,
        embed_dim: int,
        architecture: str | dict[str, Any] | None = None,
        pretrained: str | None = None,
        files: dict[str, str] | None = None,
        **head: Any,
    ) -> None:
        # Text has no preprocess_cfg; of a bare weights file none is asked for.
        source = find_source(architecture, pretrained, preprocess={})
        settings: dict[str, Any] = {"architecture": architecture or "ViT-B-32"}
        if pretrained is not None or not isinstance(architecture, str | None):
            settings = {"architecture": half_config(source.model, "text_cfg")}
        super().__init__(embed_dim, source.model["embed_dim"], settings, **head)
        self.model_config = source.model
        self.files = dict(files) if files else text_files(source)
        self.tower = text_tower(source.model, self.files)
        if pretrained is not None:
            load_pretrained(self.tower, source, "text")
        text = source.model["text_cfg"]
        self.length: int = text.get("context_length", 77)
        self.tokenizer = OpenClipTokenizer(json.dumps(text), tuple(sorted(self.files.items())))

    def transform(self, train: bool) -> Callable[[Any], Any]:
        return self.tokenizer

    def empty(self, n: int) -> Tensor:
        if self.files:  # a tower of Hugging Face's takes a mean over tokens, and zeros are none: an empty text has two
            return self.tokenizer("").expand(n, -1).clone()
        return torch.zeros(n, self.length, dtype=torch.int64)

    def features(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.tower(inputs)
        return features

    def layers(self) -> list[list[nn.Parameter]]:
        return tower_layers(self.tower)
