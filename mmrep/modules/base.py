"""What all objectives' LightningModules share: one step, one optimiser, one validation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from mmrep.batch import Batch
from mmrep.encoders import Encoder
from mmrep.errors import CheckpointError, ConfigError
from mmrep.evaluation.embeddings import EmbeddingCollector
from mmrep.evaluation.retrieval import retrieve
from mmrep.interop.load import CONFIG_KEY
from mmrep.losses import Loss, LossOutput
from mmrep.model import MultimodalModel


class ContrastiveModule(pl.LightningModule):
    """Trains a `MultimodalModel` with AdamW, linear warm-up and cosine decay, and validates it by retrieval.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        loss: The objective.
        embed_dim: Width of the embedding space, given to every encoder.
        normalize: ``l2`` or ``layernorm``: see `MultimodalModel`.
        share: Modality -> the modality whose encoder it uses too.
        lr: Peak learning rate.
        weight_decay: Of weight matrices; biases, norms and the loss's own parameters are not decayed.
        warmup_steps: Steps of linear warm-up.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        loss: Loss,
        *,
        embed_dim: int,
        normalize: str,
        share: dict[str, str] | None,
        lr: float,
        weight_decay: float,
        warmup_steps: int,
    ) -> None:
        super().__init__()
        built = {name: encoder(embed_dim) for name, encoder in encoders.items()}
        self.model = MultimodalModel(built, loss, normalize=normalize, share=share)
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self._collector = EmbeddingCollector()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = self.model(batch.inputs)
        return rows

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self._loss(batch, self(batch))
        if not bool(output.loss.isfinite()):
            raise ConfigError(f"the loss is {float(output.loss)} at step {self.global_step}", fix="lower model.lr")
        self._log("train", output, batch)
        return output.loss

    def on_validation_epoch_start(self) -> None:
        self._collector = EmbeddingCollector()

    def on_test_epoch_start(self) -> None:
        self._collector = EmbeddingCollector()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step("test", batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Keys, and per modality rows ``[B, D]`` and presence ``[B]``, without padding."""
        collector = EmbeddingCollector()
        collector.add(batch, self(batch))
        result = collector.result()
        return {"keys": result.keys, "embeddings": result.rows, "present": result.present}

    def on_validation_epoch_end(self) -> None:
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        self._log_retrieval("test")

    def configure_optimizers(self) -> Any:
        own = {id(parameter) for parameter in self.model.loss.parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trained if parameter.ndim > 1 and id(parameter) not in own]
        kept = [parameter for parameter in trained if parameter.ndim <= 1 or id(parameter) in own]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr)
        steps = (
            int(self.trainer.estimated_stepping_batches)
            if math.isfinite(self.trainer.estimated_stepping_batches)
            else 0
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupCosine(self.warmup_steps, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.model.config()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)

    def check_checkpoint(self, checkpoint: dict[str, Any], where: object = None) -> None:
        """Refuse a checkpoint whose model is not this one.

        Raises:
            CheckpointError: With the first few differences.
        """
        if CONFIG_KEY not in checkpoint:
            raise CheckpointError("not a checkpoint of mmrep", where=where, fix="give a file that `mmrep fit` wrote")
        if differences := _differences(checkpoint[CONFIG_KEY], self.model.config()):
            lines = "; ".join(differences[:3])
            raise CheckpointError(
                f"the checkpoint is of another config: {lines}", where=where, fix="use its config.yaml"
            )

    def _loss(self, batch: Batch, rows: dict[str, Tensor]) -> LossOutput:
        output: LossOutput = self.model.loss(rows, {name: batch.present[name] for name in rows})
        return output

    def _evaluation_step(self, stage: str, batch: Batch) -> None:
        # Padding makes batches equally many on all ranks, so that the loss may run its collectives here too.
        rows = self(batch)
        self._log(stage, self._loss(batch, rows), batch)
        self._collector.add(batch, rows)

    def _log(self, stage: str, output: LossOutput, batch: Batch) -> None:
        size = len(batch)
        self.log(f"{stage}/loss", output.loss, prog_bar=True, batch_size=size, sync_dist=True)
        for name, value in output.parts.items():
            self.log(f"{stage}/loss/{name}", value, batch_size=size, sync_dist=True)
        for name, value in output.metrics.items():  # equal on all ranks already
            self.log(f"{stage}/{name}", value, batch_size=size)

    def _log_retrieval(self, stage: str) -> None:
        embeddings = self._collector.gathered(self.device)
        for direction, figures in retrieve(embeddings, self.model.loss).items():
            for name in ("recall@1", "mrr"):
                if figures[name] is not None:
                    self.log(f"{stage}/{direction}/{name}", figures[name], rank_zero_only=False, sync_dist=False)


class WarmupCosine:
    """Factor of the learning rate at a step: linear from 0 to 1, then half a cosine to 0.

    Args:
        warmup: Steps of the rise.
        total: Steps of the run; 0 for a run without an end, whose rate stays at its peak.
    """

    def __init__(self, warmup: int, total: int) -> None:
        self.warmup, self.total = warmup, total

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup) if self.total else 0.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _differences(theirs: Any, ours: Any, path: str = "model") -> list[str]:
    """Where two plain configs differ, a line each."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [line for key in keys for line in _differences(theirs.get(key), ours.get(key), f"{path}.{key}")]
    return [] if theirs == ours else [f"{path} is {theirs!r} there and {ours!r} here"]
