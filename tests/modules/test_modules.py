"""What the LightningModules add to a loss: parameter groups, schedule, checkpoints that load safely."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from mmrep.data.datamodule import ShardDataModule
from mmrep.encoders import ConvImageEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.errors import CheckpointError
from mmrep.interop.load import load
from mmrep.modules import ContrastiveModule, PairwiseCLIP, Symile
from mmrep.modules.base import WarmupCosine

ENCODERS = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8),
}


def trainer(folder: Path, epochs: int = 1) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_warmup_and_cosine() -> None:
    schedule = WarmupCosine(4, 14)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule(4) == 1 and schedule(9) == pytest.approx(0.5) and schedule(14) == pytest.approx(0, abs=1e-12)
    assert schedule(99) == pytest.approx(0, abs=1e-12) and WarmupCosine(2, 0)(1000) == 1


@pytest.mark.parametrize("module_class", [PairwiseCLIP, Symile])
def test_fit_learns_checkpoints_load_and_nothing_is_decayed_that_should_not(
    module_class: type[ContrastiveModule], tiny_shards: Path, tmp_path: Path
) -> None:
    module = module_class(ENCODERS, embed_dim=8, lr=5e-3, warmup_steps=1)  # type: ignore[call-arg,arg-type]  # as YAML does
    data = ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0)
    run = trainer(tmp_path, epochs=4)
    run.fit(module, data)
    assert float(run.callback_metrics["train/loss"]) < math.log(16)
    assert {"val/loss", "val/audio+text->image/recall@1", "train/logit_scale"} <= set(run.callback_metrics)
    kept, decayed = run.optimizers[0].param_groups[1], run.optimizers[0].param_groups[0]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert any(parameter is module.model.loss.logit_scale for parameter in kept["params"])
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    rows = module.model.eval().encode(text=["a red thing"])["text"]
    assert torch.equal(load(tmp_path / "a.ckpt").encode(text=["a red thing"])["text"], rows)
    other = module_class(ENCODERS, embed_dim=4)  # type: ignore[call-arg,arg-type]  # as YAML does
    with pytest.raises(CheckpointError, match=r"model\.embed_dim is 8 there and 4 here"):
        trainer(tmp_path).fit(other, data, ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True)


def test_a_resumed_run_equals_one_that_was_not_interrupted(tiny_shards: Path, tmp_path: Path) -> None:
    """Stop after epoch 2 of 4, go on from the checkpoint: same weights, same shuffles, same negatives."""

    def module() -> Symile:
        pl.seed_everything(1, verbose=False)
        encoders = {
            "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
            "text": ENCODERS["text"],
            "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8, augment=False),
        }
        return Symile(encoders, embed_dim=8, warmup_steps=1)  # type: ignore[arg-type]  # lambdas stand for classes

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
