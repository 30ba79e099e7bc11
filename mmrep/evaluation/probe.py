"""Probes of frozen features: what they share, and the linear probe in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrep.batch import Batch
from mmrep.errors import MmrepError
from mmrep.evaluation.metrics import share_interval

L2_SWEEP = tuple(10.0**exponent for exponent in range(-6, 5))
"""Ridge penalties, as multiples of the mean squared singular value of the standardised features."""


@dataclass(frozen=True)
class Labelled:
    """Features ``[N, F]`` of samples, and their classes int64 ``[N]``, from 0."""

    features: Tensor
    classes: Tensor

    def known(self) -> Labelled:
        """Those samples that have a class."""
        return Labelled(self.features[self.classes >= 0], self.classes[self.classes >= 0])


@torch.inference_mode()
def collect(
    features: Mapping[str, Callable[[Tensor], Tensor]],
    loader: Iterable[Batch],
    modality: str,
    label: str,
    *,
    device: torch.device | str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> dict[str, Labelled]:
    """Several kinds of features of every sample of a loader that has the modality, in one pass.

    Args:
        features: Name -> from inputs ``[B, ...]`` on ``device`` to ``[B, F]``.
        loader: Batches.
        modality: Whose inputs.
        label: Whose classes.
        device: Where the features are computed.
        advance: Called with the number of samples done, for a progress bar.

    Raises:
        MmrepError: If no sample has the modality.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in features}
    classes = []
    for batch in loader:
        there, inputs = batch.present[modality], batch.inputs[modality]
        assert isinstance(inputs, Tensor), "in evaluation a sample comes once"
        if bool(there.any()):
            classes.append(batch.labels[label][there])
            for name, compute in features.items():
                rows[name].append(compute(inputs[there].to(device)).float().cpu())
        if advance is not None:
            advance(len(batch))
    if not classes:
        raise MmrepError(f"there is nothing to probe: no sample has '{modality}'")
    return {name: Labelled(torch.cat(parts), torch.cat(classes)) for name, parts in rows.items()}


@dataclass(frozen=True)
class ProbeData:
    """Labelled samples of three splits, checked: fitted on ``train``, chosen on ``val``, reported on ``test``."""

    train: Labelled
    val: Labelled
    test: Labelled

    @classmethod
    def of(cls, train: Labelled, val: Labelled, test: Labelled) -> ProbeData:
        """Those samples that have a class.

        Raises:
            MmrepError: If a split has none, or features are not finite.
        """
        splits = {"train": train.known(), "val": val.known(), "test": test.known()}
        for name, split in splits.items():
            if not len(split.classes):
                raise MmrepError(f"no sample of the {name} split has the label and the modality")
            if not bool(split.features.isfinite().all()):
                raise MmrepError(f"features of the {name} split hold NaN or infinity")
        return cls(**splits)

    @property
    def num_classes(self) -> int:
        """One more than the largest class of any split."""
        return int(max(split.classes.max() for split in (self.train, self.val, self.test))) + 1

    def standardized(self) -> tuple[Tensor, Tensor, Tensor]:
        """The features in float64 with the mean and spread of ``train`` taken out; those that do not vary become zeros."""
        features = self.train.features.double()
        mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
        scale = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
        train, val, test = ((s.features.double() - mean) * scale for s in (self.train, self.val, self.test))
        return train, val, test

    def figures(self, val_scores: Tensor, test_scores: Tensor) -> dict[str, Any]:
        """Accuracies of the chosen solution, from its scores ``[N, C]``, and what they are to be compared with."""
        accuracy, n = accuracy_of(test_scores, self.test.classes), len(self.test.classes)
        counts = self.train.classes.bincount(minlength=self.num_classes)
        return {
            "accuracy": accuracy,
            "accuracy_ci95": list(share_interval(accuracy, n)),
            "chance": float((self.test.classes == counts.argmax()).double().mean()),
            "val_accuracy": accuracy_of(val_scores, self.val.classes),
            "features": self.train.features.shape[1],
            "classes": int((counts > 0).sum()),
            **{name: len(getattr(self, name).classes) for name in ("train", "val", "test")},
        }


def accuracy_of(scores: Tensor, classes: Tensor) -> float:
    """Share of the samples whose class has the best score."""
    return float((scores.argmax(dim=1) == classes).double().mean())


def linear_probe(train: Labelled, val: Labelled, test: Labelled) -> dict[str, Any]:
    """Ridge regression onto one-hot classes; the penalty is the one that is best on ``val``.

    Deterministic, without steps or rates to tune: features are standardised by ``train``, the solution for every penalty of
    `L2_SWEEP` comes from one eigendecomposition, of features or of samples, whichever are fewer.

    Returns:
        ``accuracy`` on ``test`` with ``accuracy_ci95``, ``chance`` (always the commonest class of ``train``),
        ``val_accuracy``, ``l2``, and the sizes ``features``, ``classes``, ``train``, ``val`` and ``test``.

    Raises:
        MmrepError: If a split has no labelled sample, or features are not finite.
    """
    data = ProbeData.of(train, val, test)
    x, validation, held_out = data.standardized()
    y = torch.nn.functional.one_hot(data.train.classes, data.num_classes).double()
    prior = y.mean(dim=0)
    best: tuple[float, float, Tensor] | None = None
    for l2, weights in _ridge(x, y - prior):
        found = accuracy_of(validation @ weights + prior, data.val.classes)
        if best is None or found >= best[0]:  # of equals, the stronger penalty
            best = (found, l2, weights)
    assert best is not None, "the sweep is not empty"
    _, l2, weights = best
    return data.figures(validation @ weights + prior, held_out @ weights + prior) | {"l2": l2}


def _ridge(x: Tensor, y: Tensor) -> list[tuple[float, Tensor]]:
    """Penalty -> weights ``[F, C]`` that minimise ``|x w - y|^2 + penalty |w|^2``."""
    tall = x.shape[0] >= x.shape[1]
    squares, vectors = torch.linalg.eigh(x.T @ x if tall else x @ x.T)
    squares = squares.clamp(min=0)
    unit = float(squares.mean()) or 1.0
    known = vectors.T @ (x.T @ y if tall else y)
    solutions = []
    for l2 in L2_SWEEP:
        solution = vectors @ (known / (squares + l2 * unit)[:, None])
        solutions.append((l2, solution if tall else x.T @ solution))
    return solutions
