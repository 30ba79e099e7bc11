"""The linear probe against scikit-learn-like least squares written out, and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmrep.batch import Batch
from mmrep.errors import MmrepError
from mmrep.evaluation.probe import L2_SWEEP, Labelled, collect, linear_probe


def clusters(n: int, width: int, noise: float, seed: int, classes: int = 4) -> Labelled:
    """Classes around random centres that are the same for every seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, classes, (n,), generator=generator)
    return Labelled(centres[numbers] + noise * torch.randn(n, width, generator=generator), numbers)


def test_separable_classes_are_read_off_and_noise_is_not() -> None:
    easy = linear_probe(*(clusters(200, 12, 0.3, seed) for seed in range(3)))
    assert easy["accuracy"] > 0.98 and easy["classes"] == 4 and easy["features"] == 12
    assert easy["accuracy_ci95"][0] <= easy["accuracy"] <= easy["accuracy_ci95"][1]
    shuffled = clusters(200, 12, 0.3, 0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    nothing = linear_probe(
        Labelled(shuffled.features, shuffled.classes[order]), clusters(200, 12, 0.3, 1), clusters(200, 12, 0.3, 2)
    )
    assert nothing["accuracy"] < 0.6


@pytest.mark.parametrize("width", [6, 90])
def test_equals_ridge_regression_written_out(width: int) -> None:
    """Narrow features go through their own matrix, wide ones through that of the samples: the same solution."""
    train, val, test = clusters(50, width, 2.0, 0), clusters(80, width, 2.0, 1), clusters(80, width, 2.0, 2)
    found = linear_probe(train, val, test)
    x = train.features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    x = (x - mean) / std
    y = torch.nn.functional.one_hot(train.classes, 4).double()
    unit = torch.linalg.svdvals(x).square().sum() / min(x.shape)
    best: tuple[float, float] = (-1.0, 0.0)
    for l2 in L2_SWEEP:
        ridge = torch.eye(width, dtype=torch.float64) * l2 * unit
        weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean(dim=0)))

        def accuracy(split: Labelled, weights: Tensor = weights) -> float:
            scores = ((split.features.double() - mean) / std) @ weights + y.mean(dim=0)
            return float((scores.argmax(dim=1) == split.classes).double().mean())

        if accuracy(val) >= best[0]:
            best = (accuracy(val), accuracy(test))
    assert (found["val_accuracy"], found["accuracy"]) == pytest.approx(best)


def test_chance_is_the_commonest_class_of_training() -> None:
    train = Labelled(torch.randn(10, 3), torch.tensor([1] * 6 + [0] * 4))
    test = Labelled(torch.randn(5, 3), torch.tensor([1, 0, 0, 0, 2]))
    assert linear_probe(train, train, test)["chance"] == pytest.approx(0.2)


def test_samples_without_a_class_are_left_out_and_constant_features_do_no_harm() -> None:
    train, test = clusters(60, 8, 0.3, 0), clusters(60, 8, 0.3, 1)
    holes = Labelled(
        torch.cat([train.features, torch.full((3, 8), 1e6)]), torch.cat([train.classes, torch.full((3,), -1)])
    )
    assert linear_probe(holes, test, test) == linear_probe(train, test, test)
    flat = [Labelled(torch.cat([s.features, torch.ones(60, 1)], dim=1), s.classes) for s in (train, test)]
    assert linear_probe(flat[0], flat[1], flat[1])["accuracy"] == linear_probe(train, test, test)["accuracy"]


def test_impossible_splits_are_refused() -> None:
    train = clusters(20, 4, 0.3, 0)
    with pytest.raises(MmrepError, match="no sample of the val split"):
        linear_probe(train, Labelled(train.features, torch.full((20,), -1)), train)
    with pytest.raises(MmrepError, match="features of the test split hold NaN"):
        linear_probe(train, train, Labelled(train.features * torch.nan, train.classes))


def test_batches_in_which_nobody_has_the_modality_are_passed_over() -> None:
    inputs, there = torch.arange(12.0).view(6, 2), torch.tensor([False, False, True, False, True, True])
    batches = [
        Batch({"x": inputs[i : i + 2]}, {"x": there[i : i + 2]}, ["k", "k"], {"y": torch.arange(6)[i : i + 2]})
        for i in (0, 2, 4)
    ]

    def features(rows: Tensor) -> Tensor:
        assert len(rows), "an encoder may not take an empty batch"
        return rows * 2

    found = collect({"twice": features, "same": lambda rows: rows}, batches, "x", "y")
    assert found["twice"].classes.tolist() == [2, 4, 5]
    assert torch.equal(found["twice"].features, 2 * inputs[there]) and torch.equal(
        found["same"].features, inputs[there]
    )
    with pytest.raises(MmrepError, match="no sample has 'x'"):
        collect({"twice": features}, batches[:1], "x", "y")
