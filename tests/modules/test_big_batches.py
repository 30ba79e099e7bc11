"""Runs in parts, in half precision, and with Lightning's own means for large batches."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mmrep.batch import Batch
from mmrep.cli import main
from mmrep.data.datamodule import ShardDataModule
from mmrep.encoders import ConvImageEncoder, FeaturesEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.errors import ConfigError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.modules import ContrastiveModule, PairwiseCLIP, Symile
from mmrep.modules.gradient_caching import GradientCaching
from tests.gloo_pool import GlooPool
from tests.modules.test_modules import training_loss
from tests.test_cli import CONFIG

PLAIN: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8, augment=False),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8, augment=False),
}


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    common = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, enable_model_summary=False, **{**common, "max_epochs": 1, **options})


def data(shards: Path) -> ShardDataModule:
    return ShardDataModule(str(shards), global_batch_size=16, num_workers=0)


def symile(**options: Any) -> Symile:
    pl.seed_everything(1, verbose=False)
    return Symile(PLAIN, embed_dim=8, warmup_steps=1, lr=5e-3, **options)


class Gradients(pl.Callback):
    """Keeps what the optimiser got in each step, clipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.steps.append(
            {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}
        )


def gradients(module: ContrastiveModule, shards: Path, folder: Path, **options: Any) -> list[dict[str, Tensor]]:
    kept = Gradients()
    trainer(folder, callbacks=[kept], **options).fit(module, data(shards))
    return kept.steps


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_run_in_parts_is_the_run_without(clip: float | None, tiny_shards: Path, tmp_path: Path) -> None:
    """Clipping sees the whole gradient, once."""
    whole = gradients(symile(), tiny_shards, tmp_path, gradient_clip_val=clip)
    parts = gradients(symile(micro_batch_size=5), tiny_shards, tmp_path, gradient_clip_val=clip)
    assert len(whole) == len(parts) == 3
    for step, (one, other) in enumerate(zip(whole, parts, strict=True)):
        assert one.keys() == other.keys()
        total = math.hypot(*(float(gradient.norm()) for gradient in one.values()))
        assert clip is None or total == pytest.approx(clip, rel=1e-3)
        for name, gradient in one.items():
            assert float((gradient - other[name]).norm()) < (1e-2 if step else 1e-5) * total, (
                name
            )  # Adam's steps multiply rounding


def test_lightnings_accumulation_is_a_mean_over_batches_and_says_so(tiny_shards: Path, tmp_path: Path) -> None:
    """The gradient is that of the mean of two losses of 16 samples; that of one loss of 32 is another."""
    with pytest.warns(
        UserWarning, match=r"accumulate_grad_batches=2 adds .* own batch only; .*set model\.init_args\.micro_batch_size"
    ):
        together = gradients(symile(), tiny_shards, tmp_path, accumulate_grad_batches=2, limit_train_batches=2)
    batches: list[Batch] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
            batches.append(batch)

    trainer(tmp_path, callbacks=[Keep()], limit_train_batches=2).fit(symile(), data(tiny_shards))
    found = []
    module = symile()
    for batch in batches:
        module.model.zero_grad()
        module._loss(batch, module(batch)).loss.backward()
        found.append(
            {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}
        )
    for name, gradient in together[-1].items():
        assert torch.allclose(gradient, (found[0][name] + found[1][name]) / 2, rtol=1e-3, atol=1e-4), name


def test_a_run_of_the_command_in_parts(tiny_shards: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "data": {**CONFIG["data"], "path": str(tiny_shards)}, "runs": str(tmp_path / "runs")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["fit", "--config", str(tmp_path / "config.yaml"), "--trainer.max_epochs", "4"]
    option = "--model.init_args.micro_batch_size"
    assert main([*words, "--name", "parts", option, "4", "--model.init_args.kept_micro_batches", "1"]) == 0
    with (tmp_path / "runs" / "parts" / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert len(losses) == 4 and losses[-1] < losses[0]
    saved = yaml.safe_load((tmp_path / "runs" / "parts" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["micro_batch_size"] == 4
    mixing = ["--model.init_args.encoders.image.init_args.batch_norm", "true"]
    assert main([*words, "--name", "refused", option, "4", *mixing]) == 2
    assert main([*words, "--name", "refused", option, "0"]) == 2
    assert main([*words, "--name", "refused", "--model.init_args.compile", "inductr"]) == 2
    assert not (tmp_path / "runs" / "refused").exists()


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 5}])
def test_bf16_mixed_learns_on_fp32_rows(options: dict[str, Any], tiny_shards: Path, tmp_path: Path) -> None:
    """Encoders compute in bf16; rows, logits and loss are of fp32: the loss is that of the same rows outside autocast."""
    pl.seed_everything(1, verbose=False)
    module, source = PairwiseCLIP(PLAIN, embed_dim=8, warmup_steps=1, lr=5e-3, **options), data(tiny_shards)
    source.setup("fit")
    before = training_loss(module, source)
    inner, losses = [], []
    convolution = module.model.encoders["image"].backbone[0]  # type: ignore[index,union-attr]  # a ConvImageEncoder
    hooks = [convolution.register_forward_hook(lambda _m, _i, out: inner.append(out.dtype))]

    def compare(loss: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert all(rows.dtype == torch.float32 for rows in inputs[0].values())
        with torch.autocast("cpu", enabled=False):
            losses.append((output.loss.detach(), loss.forward(*inputs).loss.detach()))

    hooks.append(module.model.loss.register_forward_hook(compare))
    trainer(tmp_path, max_epochs=6, precision="bf16-mixed").fit(module, source)
    for hook in hooks:
        hook.remove()
    checks = len(options)  # before the first step a pass tells whether it changes buffers
    assert set(inner[checks:]) == {torch.bfloat16} and len(losses) > 18
    assert all(mixed.dtype == torch.float32 and torch.equal(mixed, single) for mixed, single in losses)
    after = training_loss(module, source)
    assert math.isfinite(after) and after < 0.97 * before
    assert all(weight.dtype == torch.float32 for weight in module.parameters())


def half_precision(inputs: dict[str, Tensor], size: int | None, distributed: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = MultimodalModel({name: FeaturesEncoder(8, size=16, width=64) for name in inputs}, PairwiseCLIPLoss())
    run = None if size is None else GradientCaching(size)

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            rows = self.model(inputs, run)
            assert all(row.dtype == torch.float32 for row in rows.values())
            found: Tensor = self.model.loss(rows).loss
            return found

    wrapped: torch.nn.Module = DistributedDataParallel(Objective()) if distributed else Objective()
    with torch.autocast("cpu", torch.bfloat16):
        loss = wrapped(inputs)
    assert loss.dtype == torch.float32
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_bf16_on_two_ranks_is_that_of_one_process(pool2: GlooPool) -> None:
    """Up to the rounding of bf16, whose sums over a part's samples are rounded once for each part."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(24, 16, generator=generator) for name in "ab"}
    expected = half_precision(inputs, None, False)
    shares = [{name: rows.split([15, 9])[rank] for name, rows in inputs.items()} for rank in range(2)]
    for size in (None, 4):
        for found in pool2.run(half_precision, [(share, size, True) for share in shares]):
            for name, gradient in expected.items():
                error = float((found[name] - gradient).norm() / gradient.norm())
                assert error < 0.03, f"{name} is off by {error:.1e}"
                assert found[name].dtype == torch.float32


def test_a_state_that_a_pass_changes_ends_the_run_before_its_first_step(tiny_shards: Path, tmp_path: Path) -> None:
    module = PairwiseCLIP(PLAIN, embed_dim=8, micro_batch_size=4)
    head = module.model.encoders["audio"]
    torch.nn.utils.parametrizations.spectral_norm(head.head)  # type: ignore[arg-type]  # a linear layer
    with pytest.raises(ConfigError, match=r"audio\.head\.parametrizations"):
        trainer(tmp_path).fit(module, data(tiny_shards))
    assert module.global_step == 0
