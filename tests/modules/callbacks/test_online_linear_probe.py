"""The probe is softmax regression by SGD on the run's own features, leaves the run alone, and is one on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mmrep.batch import Batch
from mmrep.data.build import build_index
from mmrep.data.datamodule import ShardDataModule
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.index import Index, Label
from mmrep.data.reader import Samples
from mmrep.data.stream import Stream
from mmrep.data.writer import write_shard
from mmrep.encoders import ConvImageEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.errors import CheckpointError, ConfigError, MmrepError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.modules.callbacks import OnlineLinearProbe, online_classifier
from mmrep.modules.callbacks.head_inputs import HeadInputs
from mmrep.modules.callbacks.online_classifier import OnlineClassifier
from mmrep.modules.callbacks.online_linear_probe import count_right
from tests.gloo_pool import GlooPool
from tests.modules.callbacks.small_runs import ENCODERS, SaveAt, as_rank, data, module, same, trainer, weights
from tests.tiny import CLASSES, COLOURS, MODALITIES, png

CALM: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8),
}


def stream_of(batches: int, size: int = 30, width: int = 5) -> tuple[Tensor, Tensor]:
    """Features ``[batches, size, width]`` far from zero and of unequal spread, and classes of four, some unknown."""
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(-1, 4, (batches, size), generator=generator)
    centres = 2 * torch.randn(5, width, generator=generator)
    features = centres[classes] + torch.randn(batches, size, width, generator=generator)
    return features * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0])[:width] + 7, classes


def reference(features: Tensor, classes: Tensor, lr: float, momentum: float, decay: float) -> tuple[Tensor, Tensor]:
    """The same by autograd and torch's own SGD, standardised by all labelled samples of the batches before."""
    layer = torch.nn.Linear(features.shape[2], 4, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    for number in range(1, len(features)):
        # Batches count alike, whatever they hold.
        parts = [x[c >= 0].double() for x, c in zip(features[:number], classes[:number], strict=True)]
        mean = torch.stack([part.mean(dim=0) for part in parts]).mean(dim=0)
        variance = torch.stack([(part - mean).square().mean(dim=0) for part in parts]).mean(dim=0)
        known = classes[number] >= 0
        scale = (features.shape[2] * (variance + 1e-4 * variance.mean())).rsqrt()
        x = (features[number][known].double() - mean) * scale
        optimizer.zero_grad()
        F.cross_entropy(layer(x), classes[number][known]).backward()
        optimizer.step()
    return layer.weight.detach().T, layer.bias.detach()


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_steps_are_those_of_torch(momentum: float, decay: float) -> None:
    features, classes = stream_of(12)
    probe = OnlineClassifier(5, 4, lr=0.7, momentum=momentum, weight_decay=decay)
    for x, y in zip(features, classes, strict=True):
        probe.learn(x, y)
    weight, bias = reference(features, classes, 0.7, momentum, decay)
    assert torch.allclose(probe.weights[:-1].double(), weight, rtol=1e-4, atol=1e-5)
    assert torch.allclose(probe.weights[-1].double(), bias, rtol=1e-4, atol=1e-5)


def test_it_ends_near_logistic_regression() -> None:
    features, classes = stream_of(400)
    probe = OnlineClassifier(5, 4)
    for x, y in zip(features[:300], classes[:300], strict=True):
        probe.learn(x, y)
    train, held = (part.flatten() >= 0 for part in (classes[:300], classes[300:]))
    x, y = features[:300].flatten(0, 1)[train].numpy(), classes[:300].flatten()[train].numpy()
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    fitted = LogisticRegression(C=1e4, max_iter=1000).fit(scaled, y)
    test, truth = features[300:].flatten(0, 1)[held], classes[300:].flatten()[held]
    theirs = fitted.score((test.numpy() - x.mean(axis=0)) / x.std(axis=0), truth.numpy())
    ours = float((probe.scores(test).argmax(dim=1) == truth).double().mean())
    assert 0.6 < theirs < 0.99 and ours > theirs - 0.01


def test_a_high_rate_is_stable() -> None:
    features, classes = stream_of(200)
    probe = OnlineClassifier(5, 4, lr=7.0)
    for x, y in zip(features, classes, strict=True):
        probe.learn(x, y)
    known = classes >= 0
    right = (probe.scores(features[known]).argmax(dim=1) == classes[known]).double().mean()
    assert probe.weights.abs().max() < 50 and right > 0.6


def test_batches_without_labels_and_constant_features_change_nothing() -> None:
    probe = OnlineClassifier(3, 2)
    probe.learn(torch.ones(4, 3), torch.full((4,), -1))
    probe.learn(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert float(probe.steps) == 0 and not probe.weights.any() and not probe.mean.any()
    for _ in range(5):
        probe.learn(torch.ones(4, 3), torch.tensor([0, 1, 1, 1]))
    before = probe.state_dict()
    probe.learn(torch.ones(4, 3), torch.full((4,), -1))
    assert same(before, probe.state_dict())
    assert probe.scores(torch.ones(2, 3)).isfinite().all() and int(probe.scores(torch.ones(1, 3)).argmax()) == 1


def learnt_on_a_rank(rank: int, world: int) -> dict[str, Tensor]:
    """Shares of unequal size, the last of nothing in some batches."""
    features, classes = stream_of(9)
    probe = OnlineClassifier(5, 4)
    for number, (x, y) in enumerate(zip(features, classes, strict=True)):
        ends = [0, *([20, 30] if world == 2 else [11, 30 - number % 2 * 2, 30])] if number else [0] * world + [30]
        probe.learn(x[ends[rank] : ends[rank + 1]], y[ends[rank] : ends[rank + 1]])
    return probe.state_dict()


def test_ranks_learn_what_one_process_would(pool2: GlooPool, pool3: GlooPool) -> None:
    features, classes = stream_of(9)
    probe = OnlineClassifier(5, 4)
    for x, y in zip(features, classes, strict=True):
        probe.learn(x, y)
    alone = probe.state_dict()
    for pool in (pool2, pool3):
        found = pool.run(learnt_on_a_rank, [(rank, pool.world) for rank in range(pool.world)])
        assert all(same(found[0], other) for other in found[1:])
        for name, tensor in alone.items():
            assert torch.allclose(tensor, found[0][name], rtol=1e-4, atol=1e-5), name


def test_counting() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4]])
    assert count_right(scores, torch.tensor([0, 0, 4, -1])).tolist() == [1, 2, 3]
    assert count_right(scores[:0], torch.zeros(0, dtype=torch.int64)).tolist() == [0, 0, 0]


class RandomState(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        self.state = torch.get_rng_state()


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 5}, {"compile": "eager"}])
def test_the_run_is_what_it_is_without_the_probe(options: dict[str, Any], tiny_shards: Path, tmp_path: Path) -> None:
    ends = []
    for probes in ([], [OnlineLinearProbe("image"), OnlineLinearProbe("text", lr=0.5)]):
        trained, state = module(ENCODERS, **options), RandomState()
        run = trainer(tmp_path, 2, *probes, state)
        run.fit(trained, data(tiny_shards))
        ends.append((weights(trained), state.state, float(run.callback_metrics["val/loss"])))
        assert not any(encoder.head._forward_pre_hooks for encoder in trained.model.encoders.values())  # type: ignore[union-attr]  # a module
    assert same(ends[0][0], ends[1][0]) and torch.equal(ends[0][1], ends[1][1]) and ends[0][2] == ends[1][2]


def run_state(options: dict[str, Any], shards: Path, folder: Path, lr: float = 1e-7) -> tuple[dict[str, Tensor], float]:
    probe = OnlineLinearProbe("image")
    run = trainer(folder, 2, probe)
    run.fit(module(CALM, lr=lr, **options), data(shards))
    return probe.state_dict(), float(run.callback_metrics["eval/linear_image/acc1"])


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 5}, {"micro_batch_size": 3, "kept_micro_batches": 2}, {"compile": "eager"}]
)
def test_parts_and_compiled_encoders_give_the_same_probe(
    options: dict[str, Any], tiny_shards: Path, tmp_path: Path
) -> None:
    (whole, accuracy), (parts, other) = (run_state(o, tiny_shards, tmp_path) for o in ({}, options))
    assert float(whole["steps"]) == 6 and accuracy == other
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], rtol=1e-3, atol=1e-4), name


def whole_split(shards: Path, model: MultimodalModel, split: str) -> Batch:
    dataset = ShardDataset(Samples(Index.load(shards), split), model.by_modality, global_batch_size=20)
    return next(iter(make_loader(dataset, model.by_modality)))


def test_the_figure_is_the_accuracy_on_the_validation_split(tiny_shards: Path, tmp_path: Path) -> None:
    probe, trained = OnlineLinearProbe("image", "label", name="p"), module()
    run = trainer(tmp_path, 5, probe)
    run.fit(trained, data(tiny_shards, global_batch_size=12))
    batch, model = whole_split(tiny_shards, trained.model.eval(), "val"), trained.model
    known = batch.present["image"]
    features = model.by_modality["image"].features(batch.inputs["image"][known])  # type: ignore[index]  # a tensor
    classifier = OnlineClassifier(model.by_modality["image"].feature_dim, 6)
    classifier.load_state_dict(probe.state_dict())
    ranks = (
        (classifier.scores(features).argsort(dim=1, descending=True) == batch.labels["label"][known][:, None])
        .int()
        .argmax(dim=1)
    )
    assert float(run.callback_metrics["eval/p/acc1"]) == pytest.approx(float((ranks == 0).double().mean()))
    assert float(run.callback_metrics["eval/p/acc5"]) == pytest.approx(float((ranks < 5).double().mean()))
    assert float(run.callback_metrics["eval/p/acc1"]) > 0.5, "colours are easy, chance is 1/6"


def figures_on_a_rank(rank: int, world: int, shards: Path, folder: Path) -> tuple[dict[str, Tensor], float]:
    probe = OnlineLinearProbe("image")
    with as_rank(rank, world) as options:
        run = trainer(folder, 2, probe, **options)
        run.fit(module(CALM, lr=1e-7), data(shards, global_batch_size=12))
    return probe.state_dict(), float(run.callback_metrics["eval/linear_image/acc1"])


def test_ranks_log_equal_figures_near_those_of_one_process(tiny_shards: Path, tmp_path: Path, pool3: GlooPool) -> None:
    found = pool3.run(figures_on_a_rank, [(rank, 3, tiny_shards, tmp_path) for rank in range(3)], timeout=120)
    probe = OnlineLinearProbe("image")
    run = trainer(tmp_path, 2, probe)
    run.fit(module(CALM, lr=1e-7), data(tiny_shards, global_batch_size=12))
    alone = probe.state_dict()
    assert all(same(found[0][0], state) and found[0][1] == accuracy for state, accuracy in found[1:])
    assert found[0][1] == float(run.callback_metrics["eval/linear_image/acc1"])
    for name, tensor in alone.items():
        assert torch.allclose(tensor, found[0][0][name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("where", [{"step": 2}, {"step": 3}, {"validation": 0}])
def test_a_resumed_probe_equals_one_that_was_not_interrupted(
    where: dict[str, int], tiny_shards: Path, tmp_path: Path
) -> None:
    def finished(*callbacks: pl.Callback, **options: Any) -> tuple[dict[str, Tensor], float]:
        pl.seed_everything(1, verbose=False)
        probe = OnlineLinearProbe("image")
        run = trainer(tmp_path, 3, probe, OnlineLinearProbe("audio"), *callbacks)
        run.fit(module(), data(tiny_shards), **options)
        return probe.state_dict(), float(run.callback_metrics["eval/linear_image/acc1"])

    whole = finished(SaveAt(tmp_path / "half.ckpt", **where))
    rest = finished(ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(whole[0], rest[0]) and whole[1] == rest[1]


def test_features_are_those_of_the_modality(tiny_shards: Path) -> None:
    """Also where modalities share an encoder, where samples come as views, and where parts come again."""
    torch.manual_seed(0)
    shared = MultimodalModel(
        {name: CALM[name](8) for name in ("image", "text")}, PairwiseCLIPLoss(), share={"caption": "text"}
    ).eval()
    inputs = {"image": torch.randint(0, 255, (7, 3, 16, 16), dtype=torch.uint8)}
    encoder = shared.by_modality["text"]
    inputs |= {name: torch.randint(1, 90, (7, *encoder.empty(1).shape[1:])) for name in ("text", "caption")}
    batch = Batch(inputs=dict(inputs), present={}, keys=["k"] * 7)

    def in_parts(model: MultimodalModel) -> None:
        model(batch.inputs, lambda encoder, rows: torch.cat([encoder(part) for part in rows.split(3)]))  # type: ignore[union-attr]  # a tensor
        for part in inputs["text"].split(3):
            model.by_modality["text"](part)  # as a backward pass would again

    for name in ("image", "text", "caption"):
        for run in (lambda model: model(batch.inputs), in_parts):
            watched = HeadInputs(shared, name)
            watched.attach()
            watched.expect(batch)
            run(shared)
            found = watched.take(batch)
            watched.detach()
            expected = shared.by_modality[name].features(inputs[name])
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6) and not found.requires_grad
    views = torch.randint(0, 255, (7, 2, 3, 16, 16), dtype=torch.uint8)
    batch = Batch(inputs={"image": [views]}, present={}, keys=["k"] * 7)
    watched = HeadInputs(shared, "image")
    watched.attach()
    watched.expect(batch)
    shared(batch.inputs)
    assert torch.allclose(watched.take(batch), shared.by_modality["image"].features(views[:, 0]), rtol=1e-5, atol=1e-6)
    watched.expect(batch)
    with pytest.raises(MmrepError, match="'image' were not seen"):
        watched.take(batch)


def write_multilabel_shards(folder: Path) -> Path:
    """Samples whose field holds a list of classes: none of them has one class."""
    for split, size in (("train", 16), ("val", 8)):
        samples = [
            {"__key__": f"{split}-{i}", "png": png(COLOURS[i % 6]), "txt": f"a {i}", "json": {"label": [0, i % 6]}}
            for i in range(size)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(folder / f"{split}-000000.tar", samples)
    build_index(folder, {name: MODALITIES[name] for name in ("image", "text")}, labels={"label": Label(CLASSES)}).save()
    return folder


def test_mistakes_are_found(tiny_shards: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"modality": "imgae"}, "did you mean 'image'"),
        ({"modality": "image", "label": "lable"}, "did you mean 'label'"),
    ]
    for options, message in wrong:
        run = trainer(tmp_path, 1, OnlineLinearProbe(**options))
        with pytest.raises(ConfigError, match=message):
            run.fit(module(), data(tiny_shards))
        assert run.global_step == 0
    for options, message in (
        ({"lr": 0.0}, "lr=0"),
        ({"momentum": 1.0}, "momentum=1"),
        ({"weight_decay": -1.0}, "decay=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            OnlineLinearProbe("image", **options)  # type: ignore[arg-type]  # a mixture
    stream = ShardDataModule(
        str(tiny_shards / "train-{000000..000001}.tar"),
        16,
        0,
        stream=Stream({"image": ["png"], "text": ["txt"], "audio": ["flac"]}, 2),
        eval_path=str(tiny_shards),
    )
    with pytest.raises(ConfigError, match="a stream has no labels; use KNNProbe"):
        trainer(tmp_path, 1, OnlineLinearProbe("image")).fit(module(), stream)
    several = write_multilabel_shards(tmp_path / "several")
    two = {name: ENCODERS[name] for name in ("image", "text")}
    with pytest.raises(
        MmrepError, match="no training sample has 'image' and a class in the label 'label'; a probe wants one class"
    ):
        trainer(tmp_path, 1, OnlineLinearProbe("image")).fit(module(two), data(several, global_batch_size=8))


def test_validation_data_of_other_classes_are_refused(tiny_shards: Path, tmp_path: Path) -> None:
    other = write_multilabel_shards(tmp_path / "other")
    content = json.loads((other / "index.json").read_text())
    content["labels"]["label"]["classes"] = CLASSES[::-1]
    (other / "index.json").write_text(json.dumps(content))
    two = {name: ENCODERS[name] for name in ("image", "text")}
    with pytest.raises(ConfigError, match="label 'label' has other classes than in"):
        trainer(tmp_path, 1, OnlineLinearProbe("image")).fit(module(two), data(tiny_shards, eval_path=str(other)))
    probe, wider = OnlineClassifier(3, 2), OnlineClassifier(4, 2)
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(CheckpointError, match="3 features and 2 classes, this one 4 and 2"):
        wider.load_state_dict(probe.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())


def test_a_step_sends_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/callbacks.md: (F + 1) C + 2 F + 1 numbers, in one sum over the ranks."""
    sent: list[int] = []

    def counted(part: torch.Tensor) -> torch.Tensor:
        sent.append(part.numel())
        return part

    monkeypatch.setattr(online_classifier, "sum_over_ranks", counted)
    OnlineClassifier(5, 3).learn(torch.randn(4, 5), torch.tensor([0, 1, 2, -1]))
    assert sent == [(5 + 1) * 3 + 2 * 5 + 1]
