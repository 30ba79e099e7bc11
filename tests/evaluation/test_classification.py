"""Zero-shot figures against CLIP_benchmark's formulas written out over whole matrices, and against torchmetrics."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from mmrep.encoders import ConvImageEncoder, NgramTextEncoder
from mmrep.errors import MmrepError
from mmrep.evaluation.classification import accuracies, class_embeddings, classify, mean_average_precision
from mmrep.evaluation.clip_benchmark_json import clip_benchmark_json
from mmrep.evaluation.embeddings import Embeddings
from mmrep.evaluation.retrieval import retrieve
from mmrep.losses import PairwiseCLIPLoss, SymileLoss
from mmrep.model import MultimodalModel
from tests.gloo_pool import GlooPool
from tests.losses.cases import unit_rows

TEMPLATES = ["a photo of a {c}.", "a {c}"]


def tiny_model(normalize: str = "l2") -> MultimodalModel:
    torch.manual_seed(0)
    encoders = {"image": ConvImageEncoder(8, image_size=16, width=8), "text": NgramTextEncoder(8, width=16, buckets=99)}
    return MultimodalModel(encoders, PairwiseCLIPLoss(), normalize=normalize).eval()


def rows_of(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def samples(n: int = 300, classes: int = 12, d: int = 16) -> tuple[Embeddings, Tensor]:
    """Samples near their class."""
    classifier = rows_of(classes, d, 1)
    truth = torch.randint(0, classes - 1, (n,), generator=torch.Generator().manual_seed(2))  # the last never occurs
    rows = F.normalize(classifier[truth] + 2.5 * rows_of(n, d, 3), dim=-1)
    return Embeddings({"image": rows}, {"image": torch.ones(n, dtype=torch.bool)}, {"label": truth}), classifier


def figures_of(embeddings: Embeddings, classifier: Tensor) -> dict[str, Any]:
    return classify(embeddings, PairwiseCLIPLoss(), classifier, given=["image"], target="text", labels=["label"])


def test_classification_equals_clip_benchmarks_formulas() -> None:
    embeddings, classifier = samples()
    found, target = figures_of(embeddings, classifier), embeddings.labels["label"]
    logits = 100.0 * embeddings.rows["image"] @ classifier.T
    top = logits.topk(5, 1, True, True)[1].t()
    correct = top.eq(target.view(1, -1).expand_as(top))
    acc1, acc5 = (float(correct[:k].reshape(-1).float().sum(0).numpy()) / len(target) for k in (1, 5))
    # sklearn.metrics.balanced_accuracy_score, as it is defined
    confusion = np.zeros((12, 12), dtype=np.int64)
    np.add.at(confusion, (target.numpy(), logits.argmax(axis=1).numpy()), 1)
    occurring = confusion.sum(axis=1) > 0
    balanced = np.mean(np.diag(confusion)[occurring] / confusion.sum(axis=1)[occurring])
    assert 0.3 < acc1 < acc5 < 1 and occurring.sum() == 11
    assert (found["acc1"], found["acc5"], found["mean_per_class_recall"]) == (acc1, acc5, balanced)
    assert found["n"] == 300 and found["chance_acc1"] == 1 / 12 and found["acc1_ci95"][0] < acc1 < found["acc1_ci95"][1]


def test_retrieval_equals_clip_benchmarks_formulas_with_ragged_captions() -> None:
    """A picture has one to seven captions; those beyond the first are samples without a picture."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 8, (90,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(90), counts)
    images = rows_of(90, 12, 4)
    texts = F.normalize(images[owner] + 1.2 * rows_of(len(owner), 12, 5), dim=-1)
    scores = texts @ images.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owner] = True

    def recall_at_k(scores: Tensor, positive: Tensor, k: int) -> float:
        chosen = torch.nn.functional.one_hot(torch.topk(scores, k, dim=1)[1], num_classes=scores.shape[1])
        hits = (chosen * positive.view(len(scores), 1, -1)).sum(dim=(1, 2))
        return float(((hits / positive.sum(dim=1)) > 0).float().mean().item())

    expected = {f"image_retrieval_recall@{k}": recall_at_k(scores, positive, k) for k in (1, 5, 10)}
    expected |= {f"text_retrieval_recall@{k}": recall_at_k(scores.T, positive.T, k) for k in (1, 5, 10)}
    first = torch.cat([torch.tensor([True]), owner[1:] != owner[:-1]])
    embeddings = Embeddings(
        {"image": torch.where(first[:, None], images[owner], 0), "text": texts},
        {"image": first, "text": torch.ones(len(owner), dtype=torch.bool)},
        {"@group": owner},
    )
    result = {
        "task": "retrieval",
        "data": "d",
        "checkpoint": "m",
        "directions": retrieve(embeddings, PairwiseCLIPLoss()),
    }
    theirs = clip_benchmark_json(result)
    assert theirs["metrics"] == expected and len(set(expected.values())) == 6
    assert (theirs["task"], theirs["dataset"], theirs["language"]) == ("zeroshot_retrieval", "d", "en")


def test_mean_average_precision_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 7, generator=generator)
    targets = (torch.rand(200, 7, generator=generator) < 0.2).long()
    found = mean_average_precision(scores, targets)
    assert found == pytest.approx(float(MultilabelAveragePrecision(7, average="macro")(scores, targets)), abs=1e-6)
    targets[:, 2] = 0  # theirs leaves such a class out, CLIP_benchmark counts it as 0
    assert mean_average_precision(scores, targets) < found
    perfect = torch.tensor([[1, 0], [0, 1], [1, 1]])
    assert mean_average_precision(perfect.float(), perfect) == 1


def test_known_ranks_and_what_has_no_figure() -> None:
    found = accuracies(np.array([1, 2, 6, 1]), np.array([0, 0, 1, 2]), 6)
    assert (found["acc1"], found["acc5"], found["mean_per_class_recall"]) == (0.5, 0.75, 0.5)
    assert accuracies(np.array([1]), np.array([0]), 4)["acc5"] is None
    nothing = accuracies(np.array([], dtype=int), np.array([], dtype=int), 6)
    assert set(nothing) == set(found) and set(nothing.values()) == {None}


def test_classes_that_tie_count_against_the_sample() -> None:
    embeddings, classifier = samples()
    twice = torch.cat([classifier, classifier])  # every class under two numbers
    assert figures_of(embeddings, twice)["acc1"] == 0
    embeddings.rows["image"][3] = torch.nan
    with pytest.raises(MmrepError, match="NaN"):
        figures_of(embeddings, classifier)


def test_samples_without_the_modality_or_the_class_are_left_out_and_counted() -> None:
    embeddings, classifier = samples()
    expected = figures_of(embeddings, classifier)
    holes = Embeddings(
        {"image": torch.cat([embeddings.rows["image"], torch.zeros(5, 16), rows_of(3, 16, 9)])},
        {"image": torch.cat([torch.ones(300), torch.zeros(5), torch.ones(3)]).bool()},
        {"label": torch.cat([embeddings.labels["label"], torch.zeros(5).long(), torch.full((3,), -1)])},
    )
    assert figures_of(holes, classifier) == expected | {"absent": 5, "unlabelled": 3}
    holes.present["image"][:] = False
    assert figures_of(holes, classifier)["acc1"] is None


def test_several_modalities_are_classified_by_the_losss_own_rule() -> None:
    rows = {name: r.float() for name, r in unit_rows(("image", "audio", "text"), 40, 8).items()}
    present = {name: torch.ones(40, dtype=torch.bool) for name in rows}
    truth, loss = torch.arange(40) % 6, SymileLoss()
    found = classify(
        Embeddings(rows, present, {"label": truth}), loss, rows["text"][:6],
        given=["audio", "image"], target="text", labels=["label"],
    )  # fmt: skip
    products = (rows["audio"] * rows["image"]) @ rows["text"][:6].T
    assert found["acc1"] == float((products.argmax(dim=1) == truth).double().mean())


@pytest.mark.parametrize("normalize", ["l2", "layernorm"])
def test_class_embeddings_are_the_normalised_mean_of_normalised_prompts(normalize: str) -> None:
    model = tiny_model(normalize)
    prompts = [["a cat", "one cat", "cats"], ["a dog"]]
    found = class_embeddings(model, "text", prompts)
    for row, texts in zip(found, prompts, strict=True):
        mean = F.normalize(model.encode(text=texts)["text"], dim=-1).mean(dim=0)
        assert torch.allclose(row, mean / mean.norm() if normalize == "l2" else F.layer_norm(mean, (8,)), atol=1e-6)


def shared(rank: int, world: int) -> tuple[list[list[float]], dict[str, Any], dict[str, Any]]:
    """Every rank brings its part of the samples and embeds its part of the classes."""
    embeddings, classifier = samples(31)
    part = torch.arange(31).tensor_split(world)[rank]
    mine = Embeddings(
        {"image": embeddings.rows["image"][part]},
        {"image": embeddings.present["image"][part]},
        {"label": embeddings.labels["label"][part], "x": embeddings.labels["label"][part] % 2, "y": part % 3 // 2},
    )
    single = figures_of(mine, classifier)
    several = classify(
        mine, PairwiseCLIPLoss(), classifier[:2], given=["image"], target="text", labels=["x", "y"], multilabel=True
    )
    rows = class_embeddings(copy.deepcopy(tiny_model()), "text", [["a", "b"], ["c"], ["d e"]])
    return rows.tolist(), single, several


def test_any_number_of_ranks_finds_the_same(pool2: GlooPool, pool3: GlooPool) -> None:
    rows, single, several = shared(0, 1)
    assert single["n"] == 31 and 0 < several["mean_average_precision"] < 1
    for pool in (pool2, pool3):
        for found in pool.run(shared, [(rank, pool.world) for rank in range(pool.world)]):
            assert np.allclose(found[0], rows, atol=1e-6) and found[1:] == (single, several)
