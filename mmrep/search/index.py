"""`EmbeddingIndex`: the samples of a folder that `EmbeddingJob` wrote, found by any modality or several."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmrep.errors import ConfigError, DataError, MmrepError, check_choice, did_you_mean
from mmrep.model import MultimodalModel
from mmrep.search.approximate import approximate_search
from mmrep.search.embed import MODEL, rows_path
from mmrep.search.manifest import AGAIN, Manifest, model_digest
from mmrep.search.row_files import FORMATS, check_installed
from mmrep.search.top_k import RunningTopK

TILE = 8192
"""Rows that are read and scored at a time."""
QUERIES = 64
"""Queries that are scored at a time."""
EXACT_ROWS = 1_000_000
"""Up to so many candidates are all scored; of more, an approximate index chooses which."""
METHODS = ("auto", "exact", "approximate")


@dataclass(frozen=True)
class Hit:
    """A sample that was found.

    Attributes:
        score: By the model's rule.
        key, shard: Whose.
        number: Its place in the shard.
    """

    score: float
    key: str
    shard: str
    number: int


@dataclass(frozen=True)
class Answers:
    """What a search gave.

    Attributes:
        hits: For each query, best first.
        method: ``exact``, or ``faiss`` where only the candidates of its cells were scored.
        note: Why not the method that was asked for.
    """

    hits: list[list[Hit]]
    method: str
    note: str = ""


class EmbeddingIndex:
    """Embeddings on disk and the model that made them. Rows are mapped and read in tiles; memory does not grow with them.

    Example:
        >>> index = EmbeddingIndex.load("embeddings/emoji")
        >>> rows = index.model.encode(text=["a red apple"])
        >>> index.search(rows, target="image", k=10).hits[0][0].key
    """

    def __init__(self, folder: Path, manifest: Manifest, model: MultimodalModel) -> None:
        self.folder, self.manifest, self.model = folder, manifest, model
        self._files = FORMATS[manifest.source.file_format]
        self._starts = [0]
        for record in manifest.shards:
            self._starts.append(self._starts[-1] + record.rows)
        self._samples = lru_cache(maxsize=32)(self._read_samples)

    @classmethod
    def load(
        cls, folder: Path | str, *, device: torch.device | str = "cpu", classes: Mapping[str, type] | None = None
    ) -> EmbeddingIndex:
        """Open a folder.

        Args:
            folder: That `mmrep embed` wrote.
            device: Where queries are embedded and candidates scored.
            classes: Encoders and losses of your own that the model uses, by name.

        Raises:
            MmrepError: If it is not whole, or its model is not the one that made the embeddings.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if not manifest.complete:
            raise DataError("the embedding is not finished", where=folder, fix=AGAIN)
        if broken := [record.name for record in manifest.shards if not record.sizes_fit(folder)]:
            raise DataError(
                f"{len(broken)} of {len(manifest.shards)} shards' embeddings are gone or cut short, the first: {broken[0]}",
                where=folder,
                fix=AGAIN,
            )
        check_choice("format", manifest.source.file_format, FORMATS)
        check_installed(manifest.source.file_format)
        model = MultimodalModel.from_pretrained(folder / MODEL, classes)
        if model_digest(model) != manifest.source.model:
            raise DataError(
                "the model is not the one that made the embeddings", where=folder / MODEL, fix="embed into a new folder"
            )
        return cls(folder, manifest, model.to(device))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that were embedded: what can be searched for."""
        return tuple(self.manifest.source.modalities)

    def count(self, target: str) -> int:
        """How many samples have a modality."""
        return sum(record.present.get(target, 0) for record in self.manifest.shards)

    def tiles(self, target: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All rows of a modality in order, a tile at a time: numbers int64 ``[n]``, rows ``[n, D]``, contents int64 ``[n]``."""
        width = self.manifest.source.embed_dim
        for first, record in zip(self._starts, self.manifest.shards, strict=False):
            path = rows_path(self.folder, record.name)
            for numbers, rows, contents in self._files.tiles(path, target, record.rows, width, TILE):
                tensor = torch.from_numpy(np.require(rows, requirements="W"))
                yield torch.from_numpy(numbers) + first, tensor, torch.from_numpy(np.array(contents))

    @torch.inference_mode()
    def search(
        self, given: Mapping[str, Tensor], *, target: str, k: int = 10, method: str = "auto", copies: bool = False
    ) -> Answers:
        """The samples whose ``target`` fits what is given best, by the rule that the model was trained with.

        Args:
            given: One or more other modalities, ``{modality: [Q, D]}``, as `MultimodalModel.encode` gives.
            target: Modality of the candidates.
            k: How many; fewer are found where there are fewer.
            method: ``exact`` scores every candidate. ``approximate`` scores those that a faiss index chooses, which needs
                faiss and a rule that is linear in the candidate; it is exact where that is not so. ``auto`` is exact up to
                a million candidates.
            copies: Whether candidates of identical content are all found; otherwise the first of them stands for all.

        Raises:
            MmrepError: On an unknown modality, queries that do not fit, or a case that the loss cannot score.
        """
        queries = self._check(given, target, k)
        check_choice("method", method, METHODS)
        self.score(target, given, queries.new_ones(1, queries.shape[1]))  # an impossible case fails before the work
        note, k = "", min(k, self.count(target))
        if method == "approximate" or (method == "auto" and self.count(target) > EXACT_ROWS):
            found = "copies are asked for" if copies else approximate_search(self, given, target, k)
            if not isinstance(found, str):
                return Answers([hits for each in found for hits in self._hits(*each)], "faiss")
            note = f"{found}: every candidate was scored"
        return Answers(self._exact(given, target, k, copies), "exact", note)

    def _check(self, given: Mapping[str, Tensor], target: str, k: int) -> Tensor:
        if target not in self.modalities:
            raise MmrepError(
                f"no '{target}' was embedded", where=self.folder, fix=did_you_mean(target, self.modalities)
            )
        if k < 1:
            raise ConfigError(f"k={k}", fix="ask for at least one")
        if not given:
            raise MmrepError(f"nothing is given to find '{target}' by")
        shapes = {name: tuple(rows.shape) for name, rows in given.items()}
        first = next(iter(given.values()))
        if len(set(shapes.values())) > 1 or first.ndim != 2 or first.shape[1] != self.manifest.source.embed_dim:
            raise MmrepError(f"queries of shapes {shapes}", fix=f"give [Q, {self.manifest.source.embed_dim}] each")
        if bad := [name for name, rows in given.items() if not bool(rows.isfinite().all())]:
            raise MmrepError(f"queries of {bad} hold NaN or infinity")
        if not self.count(target):
            raise MmrepError(f"no sample has '{target}'", where=self.folder)
        return first

    def score(self, target: str, given: Mapping[str, Tensor], candidates: Tensor) -> Tensor:
        """The model's rule on its device: queries ``[Q, D]`` and candidates ``[C, D]`` to ``[Q, C]`` on the CPU."""
        device = next(self.model.parameters()).device
        moved = {name: rows.to(device) for name, rows in given.items()}
        return self.model.score(target=target, candidates=candidates.to(device), given=moved).cpu()

    def _exact(self, given: Mapping[str, Tensor], target: str, k: int, copies: bool) -> list[list[Hit]]:
        count = len(next(iter(given.values())))
        parts = [slice(first, first + QUERIES) for first in range(0, count, QUERIES)]
        best = [RunningTopK(min(part.stop, count) - part.start, k) for part in parts]
        for numbers, rows, contents in self.tiles(target):
            for part, running in zip(parts, best, strict=True):
                scores = self.score(target, {name: given[name][part] for name in given}, rows)
                if not bool(scores.isfinite().all()):
                    raise DataError(
                        f"scores of '{target}' are NaN or infinite: its rows are", where=self.folder, fix=AGAIN
                    )
                running.add(scores, numbers, None if copies else contents)
        return [hits for running in best for hits in self._hits(*running.result())]

    def _hits(self, scores: Tensor, numbers: Tensor) -> Iterator[list[Hit]]:
        for line, row in zip(scores.tolist(), numbers.tolist(), strict=True):
            yield [self._hit(score, number) for score, number in zip(line, row, strict=True) if number >= 0]

    def _hit(self, score: float, number: int) -> Hit:
        place = bisect.bisect_right(self._starts, number) - 1
        shard = self.manifest.shards[place].name
        keys, numbers = self._samples(shard)
        if not len(keys) == len(numbers) == self.manifest.shards[place].rows:
            raise DataError("keys and rows are not equally many", where=rows_path(self.folder, shard), fix=AGAIN)
        row = number - self._starts[place]
        return Hit(score, keys[row], shard, numbers[row])

    def _read_samples(self, shard: str) -> tuple[list[str], list[int]]:
        return self._files.samples(rows_path(self.folder, shard))
