"""Learned rows that stand for missing modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrep.losses.checks import Embeddings, Presence
from mmrep.ops.gather import Gathered, Selection
from mmrep.ops.multilinear import in_fp32


class Placeholders(nn.Module):
    """The Symile paper's way with missing modalities, at the level of embeddings (Saporta et al. 2024, section 4).

    There, an encoder is told by an indicator whether its input was observed, and gets a placeholder where it was not; a
    sample with a placeholder stays a positive. Here ``r + observed_m`` becomes the row of a modality that a sample has, and
    ``missing_m`` that of one which it lacks, both brought to the mean length of the observed rows: an indicator that enters a
    linear head adds such a vector. Rows of missing samples are equal, and so are each other's false negatives: `SymileLoss` can
    also leave such samples out.

    Args:
        modalities: Which there are.
        embed_dim: Width of the rows.
    """

    def __init__(self, modalities: Sequence[str], embed_dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.missing = nn.ParameterDict(
            {name: F.normalize(torch.randn(embed_dim, generator=generator), dim=0) for name in modalities}
        )
        self.observed = nn.ParameterDict({name: torch.zeros(embed_dim) for name in modalities})

    def fill(self, gathered: Gathered) -> Selection:
        """The samples that have any modality, with a row for each; all modalities must have travelled."""
        some, on_host = (
            torch.stack(list(present.values())).any(dim=0) for present in (gathered.present, gathered.on_host)
        )
        selection = replace(gathered, on_host=dict.fromkeys(gathered.rows, on_host)).select(gathered.rows)
        length = _length(torch.cat([rows[gathered.present[name]] for name, rows in gathered.rows.items()]))
        rows = {
            name: self._row(name, rows, gathered.present[name][some], length) for name, rows in selection.rows.items()
        }
        own = {name: filled[selection.mine] for name, filled in rows.items()}
        return replace(selection, own=own, rows=rows)

    def complete(
        self, target: str, candidates: Tensor, given: Embeddings, present: Presence | None
    ) -> tuple[Tensor, Embeddings, None]:
        """Candidates and queries as training saw them: a row for each modality, none absent."""
        candidates = in_fp32(candidates)
        queries = len(next(iter(given.values())))
        unknown, length = candidates.new_zeros(queries, candidates.shape[1]), _length(candidates)
        rows = {}
        for name in self.missing:
            there = torch.full((queries,), name in given, device=candidates.device)
            if name in given and present is not None:
                there = present[name]
            if name != target:
                rows[name] = self._row(name, in_fp32(given.get(name, unknown)), there, length)
        shown = torch.ones(len(candidates), dtype=torch.bool, device=candidates.device)
        return self._row(target, candidates, shown, length), rows, None

    def _row(self, name: str, rows: Tensor, present: Tensor, length: Tensor) -> Tensor:
        chosen = torch.where(present[:, None], rows + self.observed[name], self.missing[name])
        filled: Tensor = F.normalize(chosen, dim=-1) * length
        return filled


def _length(rows: Tensor) -> Tensor:
    """Mean length of rows ``[N, D]``, without gradient; 1 for unit rows, the root of D after layer normalisation."""
    length: Tensor = rows.detach().norm(dim=1).mean()
    return length
