"""Frozen parts stay bit by bit what they were, in evaluation mode, on any number of ranks; rates decay with depth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmrep.data.datamodule import ShardDataModule
from mmrep.encoders import FeaturesEncoder, NgramTextEncoder, SeriesEncoder, TimmImageEncoder
from mmrep.errors import CheckpointError, ConfigError
from mmrep.losses import PairwiseCLIPLoss, SymileLoss
from mmrep.model import MultimodalModel
from mmrep.modules import PairwiseCLIP
from mmrep.modules.freezing import depth_scales, freeze_parameters, keep_frozen_in_eval
from mmrep.modules.optim import make_optimizer
from tests.gloo_pool import GlooPool

ENCODERS: dict[str, Any] = {
    "image": lambda d: TimmImageEncoder(d, "test_resnet", image_size=32),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
}


def trainer(folder: Path, epochs: int, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "default_root_dir": folder, "accelerator": "cpu"}
    return pl.Trainer(max_epochs=epochs, **{**quiet, **options})


def data(shards: Path) -> ShardDataModule:
    return ShardDataModule(str(shards), global_batch_size=16, num_workers=0)


def weights(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if name.startswith(prefix)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Modes(pl.Callback):
    """Records whether modules are in training mode at each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool, bool]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        image = pl_module.model.encoders["image"]
        self.seen.append((image.backbone.bn1.training, image.backbone.training, image.head.training))


def test_a_locked_tower_keeps_weights_and_statistics_through_training_and_validation(
    tiny_shards: Path, tmp_path: Path
) -> None:
    module = PairwiseCLIP(ENCODERS, embed_dim=8, freeze=["image.backbone"], lr=1e-2, warmup_steps=1)
    before, modes = weights(module), Modes()
    trainer(tmp_path, 2, callbacks=[modes], num_sanity_val_steps=1).fit(module, data(tiny_shards))
    after = weights(module)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("running_mean" in name for name in before)
    assert not {name for name in changed if "image.backbone" in name}
    assert "model.encoders.image.head.weight" in changed and "model.encoders.text.vectors.weight" in changed
    assert modes.seen and set(modes.seen) == {(False, False, True)}
    open_module = PairwiseCLIP(ENCODERS, embed_dim=8, lr=1e-2, warmup_steps=1)
    before = weights(open_module)
    trainer(tmp_path, 1).fit(open_module, data(tiny_shards))
    assert not torch.equal(before[k := "model.encoders.image.backbone.bn1.running_mean"], open_module.state_dict()[k])


class SaveAt(pl.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_frozen_run_goes_on_as_if_it_had_not_stopped(tiny_shards: Path, tmp_path: Path) -> None:
    def make(freeze: list[str] | None, decay: float = 0.5) -> PairwiseCLIP:
        torch.manual_seed(1)
        return PairwiseCLIP(ENCODERS, embed_dim=8, freeze=freeze, layer_decay=decay, warmup_steps=1)

    frozen = ["image.backbone.conv1", "image.backbone.bn1", "image.backbone.layer1"]
    whole, path = make(frozen), str(tmp_path / "a.ckpt")
    pl.seed_everything(5, verbose=False)
    trainer(tmp_path, 2, callbacks=[SaveAt(4, path)]).fit(whole, data(tiny_shards))
    torch.load(path, weights_only=True)
    rest = make(frozen)
    trainer(tmp_path, 2).fit(rest, data(tiny_shards), ckpt_path=path, weights_only=True)
    assert same(weights(whole), weights(rest)) and not same(weights(make(frozen)), weights(rest))
    for other, message in [
        (make(None), "frozen is '.* parameters of encoders.image.backbone' there and '0 parameters of nothing' here"),
        (make(frozen, 0.9), "training.layer_decay is 0.5 there and 0.9 here"),
    ]:
        with pytest.raises(CheckpointError, match=message) as caught:
            trainer(tmp_path, 2).fit(other, data(tiny_shards), ckpt_path=path, weights_only=True)
        assert "\n" not in str(caught.value)
    trainer(tmp_path, 2).validate(make(None), data(tiny_shards), ckpt_path=path, verbose=False, weights_only=True)


def model() -> MultimodalModel:
    encoders = {name: make(6) for name, make in ENCODERS.items()}
    return MultimodalModel(encoders, PairwiseCLIPLoss(), share={"caption": "text"})


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["image.*"], "encoders.image."),
        (["image"], "encoders.image."),
        (["encoders.image"], "encoders.image."),
        (["encoders.image.*"], "encoders.image."),
        (["image.backbone", "image.head"], "encoders.image."),
        (["text.vectors.weight"], "encoders.text.vectors.weight"),
        (["loss"], "loss."),
    ],
)
def test_patterns(patterns: list[str], expected: str) -> None:
    built = model()
    frozen = freeze_parameters(built, patterns)
    assert set(frozen) == {name for name, _ in built.named_parameters() if name.startswith(expected)}
    assert set(frozen) == {name for name, p in built.named_parameters() if not p.requires_grad}


def test_patterns_across_modules() -> None:
    built = model()
    frozen = freeze_parameters(built, ["image.backbone.layer?.*.bn*", "*.bias"])
    assert frozen and all("bn" in name or name.endswith("bias") for name in frozen)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["imagee.*"], r"'imagee.\*' matches no parameter; did you mean 'image'"),
        (["image.backbon"], "did you mean 'image.backbone'"),
        (["caption"], "matches no parameter"),
        (["*"], "nothing is left to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_all(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PairwiseCLIP(ENCODERS, embed_dim=6, share={"caption": "text"}, freeze=patterns)


def test_training_mode_is_kept_from_what_is_frozen_only() -> None:
    built = model()
    freeze_parameters(built, ["image.backbone.layer1"])
    built.train()
    keep_frozen_in_eval(built)
    backbone: Any = built.encoders["image"].backbone  # type: ignore[union-attr]  # of the encoder
    assert not any(module.training for module in backbone.layer1.modules())
    assert backbone.layer2.training and backbone.bn1.training and backbone.training and built.encoders["text"].training


def test_rates_decay_from_the_head_to_the_input() -> None:
    encoder = SeriesEncoder(6, 2, 64, width=8, stages=3)
    built = MultimodalModel({"a": encoder, "b": FeaturesEncoder(6, size=2, width=4)}, PairwiseCLIPLoss())
    scales = depth_scales(built, 0.5)
    optimizer = make_optimizer("adamw", built, built.loss.not_decayed(), lr=0.8, weight_decay=0.1, scales=scales)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(built.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    expected = [0.05, 0.1, 0.2, 0.4]  # of the first convolution and the three stages
    for block, rate in zip(encoder.backbone, expected, strict=True):
        assert all(rates[id(p)] == pytest.approx(rate) for p in block.parameters())
    assert rates[id(encoder.head.weight)] == rates[id(next(built.loss.parameters()))] == 0.8
    perceptron: Any = built.encoders["b"].backbone  # type: ignore[union-attr]  # of the encoder
    assert {rates[id(p)] for p in perceptron.parameters()} == {0.4}  # one layer, unless an encoder says more
    before = copy.deepcopy(encoder)
    for parameter in built.parameters():
        parameter.grad = torch.ones_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()  # Adam's first step is the rate
    for old, new, rate in zip(before.backbone, encoder.backbone, expected, strict=True):
        for one, other in zip(old.parameters(), new.parameters(), strict=True):
            assert torch.allclose(one - other, torch.full_like(one, rate), atol=1e-4)


def test_without_decay_the_groups_are_what_they_were() -> None:
    built = model()
    freeze_parameters(built, ["text"])
    optimizer = make_optimizer("adamw", built, [], lr=1e-3, weight_decay=0.1, scales=depth_scales(built, 1.0))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in built.parameters() if p.requires_grad}
    assert make_optimizer("lars", built, [], lr=1e-3, weight_decay=0.1, scales=depth_scales(built, 0.5)).param_groups


@pytest.mark.parametrize("decay", [0.0, 1.5, -1.0])
def test_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"layer_decay=.* above 0 and at most 1"):
        PairwiseCLIP(ENCODERS, embed_dim=6, layer_decay=decay)


NAMES = ("a", "b", "c")


class Objective(nn.Module):
    """Two small towers and one that is frozen, head and all, with a loss."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        made = PairwiseCLIPLoss(modalities=NAMES) if loss == "clip" else SymileLoss(modalities=NAMES, embed_dim=5)
        encoders = {name: FeaturesEncoder(5, size=4, width=6) for name in NAMES}
        self.model = MultimodalModel(encoders, made)
        freeze_parameters(self.model, ["b", "a.backbone"])
        self.train()
        keep_frozen_in_eval(self.model)

    def forward(self, inputs: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.model.loss(self.model(inputs), present).loss
        return result


def gradients(loss: str, rows: slice, distributed: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = {name: torch.randn(8, 4, generator=generator) for name in NAMES}
    present = {name: torch.ones(8, dtype=torch.bool) for name in NAMES}
    present["b"][5:] = False  # the second rank has none of the frozen modality
    torch.manual_seed(11)
    objective: nn.Module = Objective(loss)
    wrapped = DistributedDataParallel(objective) if distributed else objective
    wrapped({n: v[rows] for n, v in inputs.items()}, {n: v[rows] for n, v in present.items()}).backward()
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["clip", "symile"])
def test_two_ranks_with_a_frozen_modality_equal_one_process(loss: str, pool2: GlooPool) -> None:
    whole = gradients(loss, slice(0, 8), distributed=False)
    assert whole and not any("encoders.b" in name or "a.backbone" in name for name in whole)
    for found in pool2.run(gradients, [(loss, slice(0, 5), True), (loss, slice(5, 8), True)]):
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name
