"""What the LightningModules add to a loss: parameter groups, schedule, checkpoints that load safely."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from mmrep.data.datamodule import ShardDataModule
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.reader import Samples
from mmrep.encoders import ConvImageEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.encoders.crops import Crop
from mmrep.errors import CheckpointError, ConfigError, LossError
from mmrep.interop.load import load
from mmrep.losses import PairwiseCLIPLoss
from mmrep.modules import ContrastiveModule, HigherOrder, ModalityPairwise, PairwiseCLIP, SwAV, Symile
from mmrep.modules.base import over_ranks
from mmrep.modules.optim import warmup_cosine
from tests.gloo_pool import GlooPool

ENCODERS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8),
}


def trainer(folder: Path, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_warmup_and_cosine() -> None:
    schedule = warmup_cosine(4, 14)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(4) == 1 and schedule(9) == pytest.approx(0.5) and schedule(14) == pytest.approx(0, abs=1e-12)
    assert schedule(99) == pytest.approx(0, abs=1e-12) and warmup_cosine(2, 0)(1000) == 1


VIEWS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8, views=2),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32, views=2, drop=0.1),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.15, width=8, random_window=True, views=2),
}
CROPS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(
        d, image_size=16, width=8, head_width=16, crops=[Crop(2, 16, (0.5, 1.0)), Crop(2, 8, (0.2, 0.5))]
    )
}
MODULES: dict[str, Any] = {
    "clip": (PairwiseCLIP, ENCODERS, {}),
    "siglip": (PairwiseCLIP, ENCODERS, {"form": "sigmoid", "scale_per_pair": True}),
    "star": (PairwiseCLIP, ENCODERS, {"anchor": "image"}),
    "symile": (Symile, ENCODERS, {}),
    "symile placeholder": (Symile, ENCODERS, {"missing": "placeholder", "negatives": "all"}),
    "symile pairwise": (Symile, ENCODERS, {"pairwise_weight": 0.5}),
    "swav": (SwAV, CROPS, {"num_prototypes": 12, "teacher_views": 2, "queue_length": 32, "freeze_steps": 2}),
    "swav larc": (SwAV, CROPS, {"num_prototypes": 12, "optimizer": "larc", "lr": 0.3}),
    "cross-modal swav": (SwAV, ENCODERS, {"num_prototypes": [6, 12], "prototypes": "per_modality"}),
    "modality-pairwise": (ModalityPairwise, VIEWS, {"exclude_aligned": True}),
    "clip with views": (PairwiseCLIP, VIEWS, {}),
    "gram": (HigherOrder, ENCODERS, {"objective": "gram", "optimizer": "lars"}),
    "triangle": (HigherOrder, ENCODERS, {"objective": "triangle", "anchor": "text"}),
    "confu": (HigherOrder, ENCODERS, {"objective": "confu", "fusion_width": 16}),
}


@torch.no_grad()
def training_loss(module: ContrastiveModule, data: ShardDataModule) -> float:
    """The mean loss of the whole training split in fixed batches with fixed augmentation, by copies of the module as it is."""
    assert data.index is not None
    encoders = module.model.by_modality
    dataset = ShardDataset(Samples(data.index, "train"), encoders, global_batch_size=16, train=True)
    found = []
    for batch in make_loader(dataset, encoders):
        copied = copy.deepcopy(module.model).train()  # what a forward pass leaves in queues and averages stays out
        torch.manual_seed(0)
        found.append(copied.loss(copied(batch.inputs), {name: batch.present[name] for name in encoders}).loss)
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("name", MODULES)
def test_fit_learns_checkpoints_load_and_nothing_is_decayed_that_should_not(
    name: str, tiny_shards: Path, tmp_path: Path
) -> None:
    module_class, encoders, options = MODULES[name]

    def make(embed_dim: int) -> ContrastiveModule:
        module: ContrastiveModule = module_class(
            encoders, embed_dim=embed_dim, **{"lr": 5e-3, "warmup_steps": 1, **options}
        )
        return module

    module = make(8)
    data = ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0)
    data.setup("fit")
    before = training_loss(module, data)
    run = trainer(tmp_path, epochs=6)
    run.fit(module, data)
    after = training_loss(module, data)
    assert math.isfinite(after) and after < 0.97 * before
    kept, decayed = run.optimizers[0].param_groups[1], run.optimizers[0].param_groups[0]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    whole = {id(p) for p in kept["params"]}
    own = dict(module.model.loss.named_parameters())
    assert all(id(p) in whole for key, p in own.items() if p.requires_grad and not key.startswith("fusion"))
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    loaded = load(tmp_path / "a.ckpt")
    for (key, one), other in zip(module.model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(one, other), key
    with pytest.raises(CheckpointError, match=r"model\.embed_dim is 8 there and 4 here"):
        trainer(tmp_path).fit(make(4), data, ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True)


def test_every_run_logs_the_loss_and_how_embeddings_lie(tiny_shards: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.log_every_n_steps = 1  # type: ignore[attr-defined]  # set by one of Lightning's connectors
    run.fit(
        PairwiseCLIP(ENCODERS, embed_dim=8),
        ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0),
    )
    pairs = ("image-text", "image-audio", "text-audio")
    expected = {"loss", *(f"loss/{pair}" for pair in pairs), *(f"alignment/{pair}" for pair in pairs)}
    expected |= {f"modality_gap/{pair}" for pair in pairs} | {f"uniformity/{name}" for name in ENCODERS}
    logged = set(run.callback_metrics)
    assert {f"train/{name}" for name in expected | {"logit_scale"}} <= logged
    assert {f"val/{name}" for name in expected} <= logged
    assert {
        f"val/{d}/{f}" for d in ("text->image", "audio+text->image") for f in ("recall@1", "recall@10", "mrr")
    } <= logged


def test_swav_logs_the_health_of_its_clusters(tiny_shards: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(
        SwAV(CROPS, num_prototypes=12, embed_dim=8),
        ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0),
    )
    logged = set(run.callback_metrics)
    assert {f"train/{n}" for n in ("loss", "code_entropy", "prototype_usage", "dead_prototypes")} <= logged
    assert "val/loss" not in logged and "val/uniformity/image" in logged  # a picture comes once: nothing to swap


def test_prototypes_stand_still_while_frozen(tiny_shards: Path, tmp_path: Path) -> None:
    """Through the trainer, under AdamW and LARC: bit by bit for the first steps, and no longer."""
    for optimizer in ("adamw", "larc"):
        module = SwAV(CROPS, num_prototypes=12, freeze_steps=3, optimizer=optimizer, embed_dim=8, warmup_steps=0)
        before = {name: p.detach().clone() for name, p in module.model.loss.bank.named_parameters()}  # type: ignore[union-attr,operator]  # a ClusterSwapLoss
        run = trainer(tmp_path, epochs=1)
        data = ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0)
        run.fit(module, data)
        assert run.global_step == 3
        after = dict(module.model.loss.bank.named_parameters())  # type: ignore[union-attr,operator]  # a ClusterSwapLoss
        assert all(torch.equal(before[name], after[name]) for name in before)
        trainer(tmp_path, epochs=1).fit(module, data)
        assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PairwiseCLIP(ENCODERS, anchor="txt"), "did you mean 'text'"),
        (lambda: PairwiseCLIP(ENCODERS, pairs=["image-sound"]), "no modality 'sound'"),
        (lambda: PairwiseCLIP(CROPS), "at least 2 modalities"),
        (lambda: Symile(CROPS), "at least 2 modalities"),
        (lambda: SwAV(CROPS, iterations=0), "iterations=0"),
        (lambda: SwAV(CROPS, normalize="layernorm"), "leave normalize at l2"),
        (lambda: SwAV(CROPS, optimizer="larz"), "did you mean 'lar"),
        (lambda: HigherOrder(ENCODERS, objective="grams"), "did you mean 'gram'"),
        (lambda: HigherOrder(ENCODERS, objective="confu", anchor="text"), "confu has no anchor"),
        (lambda: HigherOrder(ENCODERS, objective="gram", root=True, fusion_width=9), "gram has no root, fusion_width"),
        (lambda: HigherOrder(CROPS, objective="confu"), "at least 3"),
        (lambda: ModalityPairwise(ENCODERS, weights=[[0, 1], [1, 0]]), "3 x 3"),
    ],
)
def test_impossible_settings_are_refused_at_construction(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_resumed_run_may_be_longer(tiny_shards: Path, tmp_path: Path) -> None:
    """The cosine then ends where the longer run ends; it used to stay at 0, where the shorter one had ended."""
    data = ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0)
    rates: list[float] = []

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    short = trainer(tmp_path, epochs=2)
    short.fit(PairwiseCLIP(ENCODERS, embed_dim=8, warmup_steps=1), data)
    short.save_checkpoint(tmp_path / "short.ckpt")
    longer = trainer(tmp_path, epochs=6)
    longer.callbacks.append(Record())  # type: ignore[attr-defined]  # Lightning sets the list without declaring it
    module = PairwiseCLIP(ENCODERS, embed_dim=8, warmup_steps=1)
    longer.fit(module, data, ckpt_path=str(tmp_path / "short.ckpt"), weights_only=True)
    schedule = warmup_cosine(1, 18)
    assert len(rates) == 12
    assert rates[1:] == pytest.approx([1e-3 * schedule(step) for step in range(7, 18)])


def test_validation_loss_counts_samples_and_not_padding(tiny_shards: Path, tmp_path: Path) -> None:
    """20 samples in batches of 19: the second holds one, and weighs a twentieth."""
    module = PairwiseCLIP(ENCODERS, embed_dim=8)
    batches: list[tuple[float, int]] = []

    class Record(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, _o: Any, batch: Any, *_: Any) -> None:
            rows = module(batch)
            output = module.model.loss(rows, {name: batch.present[name] for name in rows})
            if output.parts:
                batches.append((float(output.loss), sum(bool(key) for key in batch.keys)))

    run = trainer(tmp_path)
    run.callbacks.append(Record())  # type: ignore[attr-defined]  # Lightning sets the list without declaring it
    for size in (19, 8):
        batches.clear()
        run.validate(module, ShardDataModule(str(tiny_shards), global_batch_size=size, num_workers=0), verbose=False)
        expected = sum(loss * n for loss, n in batches) / sum(n for _, n in batches)
        assert float(run.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)


def diverged(rank: int) -> float:
    """A scale beyond bounds: only the rank whose rows have a partner computes infinity."""
    loss = PairwiseCLIPLoss(max_logit_scale=None)
    with torch.no_grad():
        loss.logit_scale.fill_(95.0)
    rows = {"a": torch.eye(4), "b": torch.eye(4).roll(1, 0)}
    output = loss(rows, {"a": torch.ones(4, dtype=torch.bool), "b": torch.full((4,), rank == 0)})
    return float(over_ranks(output)[0].loss)


def test_every_rank_sees_a_loss_that_is_not_finite(pool2: GlooPool) -> None:
    assert not any(math.isfinite(value) for value in pool2.run(diverged, [(0,), (1,)]))


def test_nan_in_a_batch_names_the_modality(tiny_shards: Path, tmp_path: Path) -> None:
    module = PairwiseCLIP(ENCODERS, embed_dim=8)
    with torch.no_grad():
        module.model.by_modality["audio"].head.weight[0, 0] = math.nan  # type: ignore[union-attr,operator]  # a linear head
    with pytest.raises(LossError, match="NaN or infinity: 'audio' in"):
        trainer(tmp_path).fit(module, ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0))


def test_a_resumed_run_equals_one_that_was_not_interrupted(tiny_shards: Path, tmp_path: Path) -> None:
    """Stop after epoch 2 of 4, go on from the checkpoint: same weights, same shuffles, same negatives."""

    def module() -> Symile:
        pl.seed_everything(1, verbose=False)
        encoders = {
            "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
            "text": ENCODERS["text"],
            "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8, augment=False),
        }
        return Symile(encoders, embed_dim=8, warmup_steps=1)

    class StopAfter(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole, half = module(), module()
    data = ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0)
    run = trainer(tmp_path, epochs=4)
    run.callbacks.append(StopAfter())  # type: ignore[attr-defined]  # Lightning sets the list without declaring it
    run.fit(whole, data)
    trainer(tmp_path, epochs=4).fit(half, data, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    for (name, one), other in zip(whole.state_dict().items(), half.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
