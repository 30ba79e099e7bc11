"""Averages are the formula's; they are validated, saved and kept, and training is what it is without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

import mmrep
from mmrep.encoders import ConvImageEncoder, TimmImageEncoder
from mmrep.encoders.crops import Crop
from mmrep.errors import CheckpointError, ConfigError
from mmrep.losses import ClusterSwapLoss
from mmrep.modules import SwAV
from mmrep.modules.callbacks import EMA
from tests.gloo_pool import GlooPool
from tests.modules.callbacks.small_runs import ENCODERS, SaveAt, as_rank, data, module, same, trainer, weights

RESNET: dict[str, Any] = {**ENCODERS, "image": lambda d: TimmImageEncoder(d, "test_resnet", image_size=32)}


def test_the_decay_of_each_step() -> None:
    assert [EMA(0.9).decay_at(step) for step in (1, 2)] == [0.9, 0.9]
    assert [EMA(0.9, 2).decay_at(step) for step in (1, 2, 3, 4)] == [None, 0.9, None, 0.9]
    assert [EMA(0.9, 2, 3).decay_at(step) for step in (1, 2, 3, 4, 5)] == [0.0, 0.0, 0.0, None, 0.9]
    warming = [EMA(0.5, warmup=True).decay_at(step) for step in (1, 2, 8, 9)]
    assert warming == [2 / 11, 3 / 12, 0.5, 0.5]


class Trace(pl.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps.append({name: tensor.detach().double() for name, tensor in weights(pl_module).items()})


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 2, "start_step": 2}, {"warmup": True}])
def test_averages_are_those_of_the_formula(options: dict[str, Any], tiny_shards: Path, tmp_path: Path) -> None:
    ema, trace, trained = EMA(0.7, **options), Trace(), module(RESNET, freeze=["image.backbone.conv1", "text.vectors"])
    start = {name: tensor.double() for name, tensor in weights(trained).items()}
    run = trainer(tmp_path, 3, ema, trace)
    run.fit(trained, data(tiny_shards))
    run.save_checkpoint(tmp_path / "a.ckpt")
    averages = start
    for number, current in enumerate(trace.steps, start=1):
        if (decay := ema.decay_at(number)) is not None:
            averages = {name: decay * averages[name] + (1 - decay) * current[name] for name in current}
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same({name: tensor.double() for name, tensor in kept["current_model_state"].items()}, trace.steps[-1])
    integers = 0
    for name, tensor in kept["state_dict"].items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.double(), averages[name], rtol=1e-5, atol=1e-7), name
        else:
            integers += 1
            assert torch.equal(tensor, kept["current_model_state"][name]), name
    assert integers and not same(kept["state_dict"], kept["current_model_state"])
    assert same(weights(trained), kept["state_dict"])  # what the run leaves in its module
    frozen = [name for name, parameter in trained.named_parameters() if not parameter.requires_grad]
    assert frozen and not any(name in ema.averages.tensors for name in frozen)  # type: ignore[union-attr]  # made
    pairs = [(kept["state_dict"][name], kept["current_model_state"][name]) for name in frozen]
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs), "stored once"
    assert same(weights(mmrep.load(tmp_path / "a.ckpt")), weights(trained.model))


class Seen(pl.Callback):
    """What the module holds while others evaluate."""

    def __init__(self) -> None:
        self.head: list[Tensor] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.head.append(pl_module.state_dict()["model.encoders.image.head.weight"].clone())


def test_all_of_a_validation_is_of_the_averages_and_training_is_not_changed(tiny_shards: Path, tmp_path: Path) -> None:
    before, after, plain_trace, trace = Seen(), Seen(), Trace(), Trace()
    ema = EMA(0.7)
    trainer(tmp_path, 2, plain_trace).fit(module(), data(tiny_shards))
    expected: list[Tensor] = []

    class Expect(pl.Callback):
        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert ema.averages is not None and not ema.averages.swapped
            expected.append(ema.averages.tensors["model.encoders.image.head.weight"].clone())

    trainer(tmp_path, 2, Expect(), before, ema, after, trace, num_sanity_val_steps=1).fit(module(), data(tiny_shards))
    assert len(expected) == 3  # the sanity check and two epochs
    for one, other, wanted in zip(before.head, after.head, expected, strict=True):
        assert torch.equal(one, wanted) and torch.equal(other, wanted)
    for one_step, other_step in zip(plain_trace.steps, trace.steps, strict=True):
        assert same(one_step, other_step)


@pytest.mark.parametrize("where", [{"step": 4}, {"step": 6}, {"validation": 0}, {"validation": 1}])
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    where: dict[str, int], tiny_shards: Path, tmp_path: Path
) -> None:
    def finished(name: str, *callbacks: pl.Callback, **options: Any) -> dict[str, Any]:
        pl.seed_everything(1, verbose=False)
        run = trainer(tmp_path, 3, EMA(0.7, every_n_steps=2, warmup=True), *callbacks)
        run.fit(module(), data(tiny_shards), **options)
        run.save_checkpoint(tmp_path / name)
        kept: dict[str, Any] = torch.load(tmp_path / name, weights_only=True)
        return kept

    whole = finished("whole.ckpt", SaveAt(tmp_path / "half.ckpt", **where))
    rest = finished("rest.ckpt", ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert same(whole[key], rest[key]), key
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not same(half["state_dict"], whole["state_dict"]) and not same(
        half["state_dict"], half["current_model_state"]
    )


def test_queues_and_counters_are_the_runs_and_prototypes_are_used_at_length_1(
    tiny_shards: Path, tmp_path: Path
) -> None:
    crops = {"image": lambda d: ConvImageEncoder(d, image_size=16, width=8, crops=[Crop(2, 16, (0.5, 1.0))])}
    pl.seed_everything(1, verbose=False)
    swav = SwAV(crops, embed_dim=8, num_prototypes=12, teacher_views=2, queue_length=32, lr=0.05, warmup_steps=1)
    run = trainer(tmp_path, 3, EMA(0.8))
    run.fit(swav, data(tiny_shards))
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    own = {name for name, _ in swav.named_buffers() if name.startswith("model.loss.") and name in kept["state_dict"]}
    assert {"model.loss.step", "model.loss.queue.rows", "model.loss.queue.filled"} <= own
    for name in own:
        assert torch.equal(kept["state_dict"][name], kept["current_model_state"][name]), name
    loss = mmrep.load(tmp_path / "a.ckpt").loss
    assert isinstance(loss, ClusterSwapLoss) and int(loss.step) == 9
    stored = kept["state_dict"]["model.loss.bank.shared_0"]
    assert not torch.equal(stored, kept["current_model_state"]["model.loss.bank.shared_0"])
    assert torch.allclose(loss.bank("image", 0).norm(dim=1), torch.ones(12))


def averaged_on_a_rank(rank: int, world: int, shards: Path, folder: Path) -> tuple[dict[str, Tensor], float]:
    ema, trained = EMA(0.7), module()
    with as_rank(rank, world) as options:
        run = trainer(folder, 2, ema, **options)
        run.fit(trained, data(shards, global_batch_size=12))
    return weights(trained), float(run.callback_metrics["val/loss"])


def test_averages_are_equal_on_all_ranks(tiny_shards: Path, tmp_path: Path, pool3: GlooPool) -> None:
    found = pool3.run(averaged_on_a_rank, [(rank, 3, tiny_shards, tmp_path) for rank in range(3)], timeout=120)
    assert all(same(found[0][0], averages) and found[0][1] == loss for averages, loss in found[1:])


def test_evaluation_takes_the_averages_and_training_needs_the_callback(tiny_shards: Path, tmp_path: Path) -> None:
    trainer(tmp_path, 1, EMA(0.7), SaveAt(tmp_path / "a.ckpt", step=2)).fit(module(), data(tiny_shards))
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for callbacks in ([], [EMA(0.7)]):
        evaluated = module()
        trainer(tmp_path, 1, *callbacks).validate(
            evaluated, data(tiny_shards), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False
        )
        assert same(weights(evaluated), kept["state_dict"])
    with pytest.raises(CheckpointError, match=r"averages, and no callback .* add mmrep\.modules\.callbacks\.EMA"):
        trainer(tmp_path, 1).fit(module(), data(tiny_shards), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


class Unfreeze(pl.Callback):
    """Trains all from an epoch on."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            for parameter in pl_module.parameters():
                parameter.requires_grad_(True)
            known = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            trainer.optimizers[0].param_groups[0]["params"] += [p for p in pl_module.parameters() if id(p) not in known]


def test_what_is_unfrozen_is_averaged_from_then_on(tiny_shards: Path, tmp_path: Path) -> None:
    ema, trace, trained = EMA(0.7), Trace(), module(freeze=["text"])
    run = trainer(tmp_path, 2, ema, Unfreeze(), trace)
    run.fit(trained, data(tiny_shards))
    run.save_checkpoint(tmp_path / "a.ckpt")
    name = "model.encoders.text.head.weight"
    one, two, three = (step[name] for step in trace.steps[3:6])  # its average begins as the first weight
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    expected = 0.7 * (0.7 * one + 0.3 * two) + 0.3 * three
    assert torch.allclose(kept["state_dict"][name].double(), expected, rtol=1e-5)
    assert torch.equal(kept["current_model_state"][name].double(), three) and not torch.equal(one, three)
    again, frozen = EMA(0.7), module(freeze=["text"])
    again.setup(run, frozen, "fit")
    again.on_load_checkpoint(run, frozen, kept)
    states = again.averages.states(frozen.state_dict())  # type: ignore[union-attr]  # made
    assert same(states[0], kept["state_dict"]) and same(states[1], kept["current_model_state"])


def test_averages_may_begin_with_a_checkpoint_that_has_none(tiny_shards: Path, tmp_path: Path) -> None:
    trainer(tmp_path, 2, SaveAt(tmp_path / "a.ckpt", step=5)).fit(module(), data(tiny_shards))
    kept, ema, seen = torch.load(tmp_path / "a.ckpt", weights_only=True), EMA(0.5), Trace()
    trained = module()
    with pytest.warns(UserWarning, match="made without EMA"):
        trainer(tmp_path, 2, ema, seen).fit(
            trained, data(tiny_shards), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )
    name = "model.encoders.image.head.weight"
    expected = 0.5 * kept["state_dict"][name] + 0.5 * seen.steps[0][name].float()
    assert len(seen.steps) == 1, "one step was left"
    assert torch.allclose(weights(trained)[name], expected)


def test_what_lightning_does_otherwise(tiny_shards: Path, tmp_path: Path) -> None:
    """The reasons for a callback of our own; where this fails, one of them is gone."""
    crops = {"image": lambda d: ConvImageEncoder(d, image_size=16, width=8, crops=[Crop(2, 16, (0.5, 1.0))])}
    swav = SwAV(crops, embed_dim=8, num_prototypes=12, teacher_views=2, queue_length=32, lr=0.05, warmup_steps=1)
    theirs, seen = pl.callbacks.EMAWeightAveraging(decay=0.8), Seen()
    run = trainer(tmp_path, 2, theirs, seen)
    trace = Trace()
    run.callbacks.append(trace)  # type: ignore[attr-defined]  # Lightning sets the list without declaring it
    run.fit(swav, data(tiny_shards))
    assert torch.equal(seen.head[0].double(), trace.steps[2]["model.encoders.image.head.weight"]), "not the averages"
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert not torch.equal(
        kept["state_dict"]["model.loss.queue.rows"].double(), trace.steps[-1]["model.loss.queue.rows"]
    )
    assert int(kept["state_dict"]["model.loss.step"]) < int(trace.steps[-1]["model.loss.step"])


def test_impossible_settings_are_refused(tiny_shards: Path, tmp_path: Path) -> None:
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"every_n_steps": 0}, {"start_step": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            EMA(**options)  # type: ignore[arg-type]  # a mixture
    with pytest.raises(ConfigError, match="two callbacks average"):
        trainer(tmp_path, 1, EMA(), pl.callbacks.EMAWeightAveraging()).fit(module(), data(tiny_shards))
    with pytest.raises(ConfigError, match=r"bfloat16 .*bf16-mixed"):
        trainer(tmp_path, 1, EMA(), precision="bf16-true").fit(module(), data(tiny_shards))
