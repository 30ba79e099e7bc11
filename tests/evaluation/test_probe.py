"""The probes against least squares, Newton's optimum and lightly's neighbours, and their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmrep.batch import Batch
from mmrep.errors import MmrepError
from mmrep.evaluation.knn import knn_probe, knn_votes
from mmrep.evaluation.probe import L2_SWEEP, Labelled, collect, linear_probe
from mmrep.evaluation.sgd_probe import fit_softmax, sgd_probe

PROBES = {"ridge": linear_probe, "sgd": sgd_probe, "knn": knn_probe}


def clusters(n: int, width: int, noise: float, seed: int, classes: int = 4) -> Labelled:
    """Classes around random centres that are the same for every seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, classes, (n,), generator=generator)
    return Labelled(centres[numbers] + noise * torch.randn(n, width, generator=generator), numbers)


@pytest.mark.parametrize("method", PROBES)
def test_separable_classes_are_read_off_and_noise_is_not(method: str) -> None:
    probe = PROBES[method]
    easy = probe(*(clusters(200, 12, 0.3, seed) for seed in range(3)))
    assert easy["accuracy"] > 0.98 and easy["classes"] == 4 and easy["features"] == 12
    assert easy["accuracy_ci95"][0] <= easy["accuracy"] <= easy["accuracy_ci95"][1]
    shuffled = clusters(200, 12, 0.3, 0)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    nothing = probe(
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


@pytest.mark.parametrize("method", PROBES)
def test_samples_without_a_class_are_left_out_and_constant_features_do_no_harm(method: str) -> None:
    probe, train, test = PROBES[method], clusters(60, 8, 0.3, 0), clusters(60, 8, 0.3, 1)
    holes = Labelled(
        torch.cat([train.features, torch.full((3, 8), 1e6)]), torch.cat([train.classes, torch.full((3,), -1)])
    )
    assert probe(holes, test, test) == probe(train, test, test), "and the same again: nothing is drawn at random"
    flat = [Labelled(torch.cat([s.features, torch.ones(60, 1)], dim=1), s.classes) for s in (train, test)]
    assert probe(flat[0], flat[1], flat[1])["accuracy"] == probe(train, test, test)["accuracy"]


@pytest.mark.parametrize("method", PROBES)
def test_impossible_splits_are_refused(method: str) -> None:
    probe, train = PROBES[method], clusters(20, 4, 0.3, 0)
    with pytest.raises(MmrepError, match="no sample of the val split"):
        probe(train, Labelled(train.features, torch.full((20,), -1)), train)
    with pytest.raises(MmrepError, match="features of the test split hold NaN"):
        probe(train, train, Labelled(train.features * torch.nan, train.classes))


def test_sgd_finds_the_minimum_of_every_weight_decay() -> None:
    """Softmax regression is convex: LBFGS on the whole of the data, in float64, is the reference."""
    data, decays = clusters(300, 6, 1.5, 0), (1e-3, 1e-2, 1e-1)
    x = data.features / data.features.norm(dim=1).max()
    found = fit_softmax(x, data.classes, 4, 3000, decays, seed=0).double()

    def objective(weights: Tensor, decay: float) -> Tensor:
        scores = x.double() @ weights[:-1] + weights[-1]
        return torch.nn.functional.cross_entropy(scores, data.classes) + decay / 2 * weights[:-1].square().sum()

    for weights, decay in zip(found, decays, strict=True):
        best = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([best], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def closure(best: Tensor = best, decay: float = decay, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = objective(best, decay)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        least = float(objective(best.detach(), decay))
        assert least - 1e-9 <= float(objective(weights, decay)) < least + 1e-5


def test_sgd_chooses_the_stronger_of_equal_decays_and_takes_more_samples_than_a_batch() -> None:
    easy = [clusters(1500, 12, 0.1, seed) for seed in range(3)]
    found = sgd_probe(*easy, steps=50)
    assert found["accuracy"] == 1 and found["weight_decay"] == 0.1


def test_neighbours_vote_as_in_lightly() -> None:
    from lightly.utils.benchmarking.knn import knn_predict

    train, test = clusters(120, 10, 2.0, 0), clusters(50, 10, 2.0, 1)
    unit = [torch.nn.functional.normalize(s.features, dim=1) for s in (train, test)]
    for k, temperature in ((1, 0.1), (20, 0.07), (120, 0.5)):
        expected = knn_predict(unit[1], unit[0].T, train.classes, num_classes=4, knn_k=k, knn_t=temperature)
        votes = knn_votes(train, test.features, 4, [1, k], temperature)[k]
        assert votes.argmax(dim=1).tolist() == expected[:, 0].tolist()


def test_k_is_chosen_on_val_and_never_larger_than_the_training_set() -> None:
    train, test = clusters(30, 6, 0.2, 0), clusters(40, 6, 0.2, 1)
    assert knn_probe(train, test, test, neighbours=(200,))["k"] == 30
    found = knn_probe(train, test, test, neighbours=(200, 3))
    assert found["k"] == 3 and found["accuracy"] == 1, "of equals, the fewer"
    for wrong in ({"neighbours": (0,)}, {"neighbours": ()}, {"temperature": 0.0}):
        with pytest.raises(MmrepError, match="must be positive"):
            knn_probe(train, test, test, **wrong)  # type: ignore[arg-type]


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
