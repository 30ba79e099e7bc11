"""The figures of the nearest neighbours are the command's and scikit-learn's, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from mmrep.cli import main
from mmrep.data.index import Index
from mmrep.data.order import Contents
from mmrep.encoders import ConvImageEncoder
from mmrep.errors import ConfigError, MmrepError
from mmrep.evaluation.knn import TEMPERATURE, knn_votes
from mmrep.evaluation.probe import accuracy_of
from mmrep.model import MultimodalModel
from mmrep.modules.callbacks import KNNProbe, ZeroShotEvaluation
from mmrep.modules.callbacks.labelled_features import SpreadPlan, labelled_features
from tests.gloo_pool import GlooPool
from tests.modules.callbacks.small_runs import ENCODERS, data, module, trainer
from tests.modules.callbacks.test_online_linear_probe import write_multilabel_shards


def model() -> MultimodalModel:
    return module().model.eval()


def probe(shards: Path, of: MultimodalModel, **options: Any) -> KNNProbe:
    """A probe that is set up without a run."""

    class Holder:
        model = of

    made = KNNProbe(**{"modality": "image", "data": str(shards), "batch_size": 5, **options})
    made.setup(None, Holder(), "fit")  # type: ignore[arg-type]  # it asks for nothing else
    return made


@pytest.mark.parametrize("modality", ["image", "audio"])
def test_figures_are_those_of_the_command(modality: str, tiny_shards: Path, tmp_path: Path) -> None:
    of = model()
    folder = of.save_pretrained(tmp_path / "model")
    words = ["eval", "probe", "--checkpoint", str(folder), "--data", str(tiny_shards), "--device", "cpu"]
    words += ["--modality", modality, "--label", "label", "--method", "knn", "--out", str(tmp_path / "p.json")]
    assert main(words) == 0
    theirs = json.loads((tmp_path / "p.json").read_text())["features"]["trained"]
    ours = probe(tiny_shards, of, modality=modality, split="test", k=theirs["k"]).evaluate(of)
    assert ours["acc1"] == theirs["accuracy"] and 0 < ours["acc1"] <= ours["acc5"] <= 1


def test_figures_are_those_of_scikit_learn(tiny_shards: Path) -> None:
    of, index = model(), Index.load(tiny_shards)
    train, val = (
        labelled_features(of.by_modality["image"], index, split, "image", "label")[0] for split in ("train", "val")
    )
    votes = KNeighborsClassifier(7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2))
    fitted = votes.fit(train.features.double().numpy(), train.classes.numpy())
    expected = fitted.score(val.features.double().numpy(), val.classes.numpy())
    assert probe(tiny_shards, of, k=7, temperature=0.2).evaluate(of)["acc1"] == pytest.approx(expected)


OPTIONS: list[dict[str, Any]] = [
    {"modality": "image"},
    {"modality": "audio", "k": 3},
    {"modality": "text", "max_bank": 17},
]


def rank_figures(rank: int, shards: Path) -> list[dict[str, float]]:
    of = model()
    return [probe(shards, of, **options).evaluate(of) for options in OPTIONS]


def test_every_rank_has_the_figures_of_one_process(tiny_shards: Path, pool2: GlooPool, pool3: GlooPool) -> None:
    alone = rank_figures(0, tiny_shards)
    for pool in (pool2, pool3):  # 20 queries of 3 ranks, in batches of 5: the last rank has 5
        for found in pool.run(rank_figures, [(rank, tiny_shards) for rank in range(pool.world)]):
            assert found == alone


def nothing_on_a_rank(rank: int, shards: Path) -> str:
    of = model()
    with pytest.raises(MmrepError) as caught:
        probe(shards, of).evaluate(of)
    return str(caught.value)


def broken_on_a_rank(rank: int, shards: Path) -> str:
    """One rank alone has NaN in its features."""
    of = model()
    if rank == 1:
        for parameter in of.by_modality["image"].parameters():
            parameter.data.fill_(torch.nan)
    with pytest.raises(MmrepError) as caught:
        probe(shards, of).evaluate(of)
    return str(caught.value)


def test_ranks_stop_together(tiny_shards: Path, tmp_path: Path, pool2: GlooPool) -> None:
    several = write_multilabel_shards(tmp_path / "several")
    for message in pool2.run(nothing_on_a_rank, [(rank, several) for rank in range(2)]):
        assert "no train sample has 'image' and a class in the label 'label'; a probe wants one class" in message
    for message in pool2.run(broken_on_a_rank, [(rank, tiny_shards) for rank in range(2)]):
        assert "'image' hold NaN or infinity" in message


@pytest.mark.parametrize(("total", "most"), [(48, 17), (48, 48), (48, None), (5, 9), (1000, 3)])
def test_a_part_of_the_bank_is_spread_over_it(total: int, most: int | None) -> None:
    plan = SpreadPlan([Contents.uniform([total])], 8, 0, False, most=most)
    shares = [batch.samples for rank in range(2) for batch in plan.batches(0, 0, rank, 2)]
    taken = np.concatenate(shares)
    taken = np.sort(taken[taken >= 0])
    count = total if most is None else min(total, most)
    assert len(taken) == len(set(taken.tolist())) == count and taken[0] == 0 and taken[-1] < total
    assert len(taken) < 2 or np.ptp(np.diff(taken)) <= 1


def test_a_run_logs_the_figures_of_its_weights(tiny_shards: Path, tmp_path: Path) -> None:
    every, seldom, trained = KNNProbe("image"), KNNProbe("image", name="seldom", k=3, every_n_epochs=2), module()
    run = trainer(tmp_path, 3, every, seldom, num_sanity_val_steps=1)
    run.fit(trained, data(tiny_shards))
    assert float(run.callback_metrics["eval/knn_image/acc1"]) == pytest.approx(every.evaluate(trained.model)["acc1"])
    assert "eval/seldom/acc5" in run.callback_metrics
    shorter = trainer(tmp_path, 1, KNNProbe("image", every_n_epochs=2))
    shorter.fit(module(), data(tiny_shards))
    assert not [name for name in shorter.callback_metrics if name.startswith("eval/")]
    (found,) = trainer(tmp_path, 1, KNNProbe("image")).validate(trained, data(tiny_shards), verbose=False)
    assert found["eval/knn_image/acc1"] == pytest.approx(every.evaluate(trained.model)["acc1"])


def test_mistakes_are_found_before_the_first_step(tiny_shards: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"modality": "imgae"}, "did you mean 'image'"),
        ({"label": "lable"}, "did you mean 'label'"),
        ({"bank_split": "trian"}, "did you mean 'train'"),
        ({"split": "vla"}, "did you mean 'val'"),
        ({"data": str(tmp_path / "nothing")}, r"index\.json"),
    ]
    for options, message in wrong:
        run = trainer(tmp_path, 1, KNNProbe(**{"modality": "image", **options}))
        with pytest.raises(MmrepError, match=message):
            run.fit(module(), data(tiny_shards))
        assert run.global_step == 0
    for options, message in (
        ({"k": 0}, "k=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"max_bank": 0}, "max_bank=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            KNNProbe("image", **options)


def test_a_backbone_without_weights_is_probed(tiny_shards: Path) -> None:
    class Mean(ConvImageEncoder):
        """The mean of each channel, and nothing that is learned."""

        def __init__(self) -> None:
            super().__init__(8, image_size=16, width=8)
            for name, _ in list(self.named_children()):
                delattr(self, name)

        def features(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.float().mean(dim=(2, 3)).repeat(1, self.feature_dim)[:, : self.feature_dim]

    index, encoder = Index.load(tiny_shards), Mean()
    assert not list(encoder.parameters())
    found, places = labelled_features(encoder, index, "val", "image", "label")
    assert len(found.features) == len(places) > 10


def test_mixed_precision_is_the_encoders_alone(tiny_shards: Path, tmp_path: Path) -> None:
    """Neighbours are those of the same features, whose cosines are not rounded."""
    callback = KNNProbe("image", data=str(tiny_shards), k=5)
    run, trained = trainer(tmp_path, 2, callback, precision="bf16-mixed"), module()
    run.fit(trained, data(tiny_shards))
    encoder, index = trained.model.eval().by_modality["image"], Index.load(tiny_shards)
    with torch.autocast("cpu", torch.bfloat16):
        bank, asking = (labelled_features(encoder, index, split, "image", "label")[0] for split in ("train", "val"))
    votes = knn_votes(bank, asking.features, 1 + int(bank.classes.max()), [5], TEMPERATURE)[5]
    assert accuracy_of(votes, asking.classes) == pytest.approx(float(run.callback_metrics["eval/knn_image/acc1"]))
    with torch.autocast("cpu", torch.bfloat16):
        within = knn_votes(bank, asking.features, votes.shape[1], [5], TEMPERATURE)[5]
    assert torch.equal(within, votes)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_float_inputs_come_in_the_type_of_the_weights(precision: str, tiny_shards: Path, tmp_path: Path) -> None:
    """A run's own batches do by Lightning's doing, those of its callbacks by ours."""

    class Floats(ConvImageEncoder):
        """Takes pictures as floats."""

        def transform(self, train: bool) -> Any:
            pictured = super().transform(train)
            return lambda picture: pictured(picture).float()

        def empty(self, n: int) -> torch.Tensor:
            return super().empty(n).float()

        def features(self, inputs: torch.Tensor) -> torch.Tensor:
            assert inputs.dtype == next(self.parameters()).dtype
            return super().features(inputs)

    encoders = {**ENCODERS, "image": lambda d: Floats(d, image_size=16, width=8)}
    callbacks = [KNNProbe("image"), ZeroShotEvaluation(task="retrieval", name="shown")]
    run = trainer(tmp_path, 1, *callbacks, precision=precision)
    run.fit(module(encoders), data(tiny_shards))
    assert {"eval/knn_image/acc1", "eval/shown/text->image/recall@1"} <= run.callback_metrics.keys()
