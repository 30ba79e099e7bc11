"""What all objectives' LightningModules share: one step, one optimiser, one validation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from mmrep.batch import Batch
from mmrep.encoders import Encoder
from mmrep.errors import CheckpointError, LossError, check_choice
from mmrep.evaluation.embeddings import EmbeddingCollector
from mmrep.evaluation.geometry import geometry
from mmrep.evaluation.retrieval import retrieve
from mmrep.interop.load import CONFIG_KEY, FILES_KEY
from mmrep.losses import Loss, LossOutput
from mmrep.model import MultimodalModel
from mmrep.modules.freezing import depth_scales, freeze_parameters, keep_frozen_in_eval
from mmrep.modules.gradient_caching import make_caching, refuse_changing_state, warn_of_accumulation
from mmrep.modules.logged import is_log_step, log_figures
from mmrep.modules.optim import OPTIMIZERS, Schedule, make_optimizer, warmup_cosine
from mmrep.modules.preparation import check_backend, prepare_encoders
from mmrep.ops.gather import gather_embeddings, rank, sum_over_ranks, world_size
from mmrep.ops.step_clock import ENCODERS_FORWARD, LOSS_FORWARD, mark_backward, timed
from mmrep.stable_hash import stable_hash

SEED_KEY = "mmrep_random_seed"
"""Where a checkpoint keeps the seed that the random numbers of all steps derive from."""
TRAINED_KEY = "mmrep_trained"
"""Where it keeps which parameters are frozen, and the layer decay: the optimiser's state fits no others."""


class ContrastiveModule(pl.LightningModule):
    """Trains a `MultimodalModel` with linear warm-up and cosine decay, and validates it by retrieval.

    Args:
        encoders: Modality -> encoder. Any names, as long as the shards have them.
        make_loss: From the modalities and the width to the objective.
        embed_dim: Width of the embedding space, given to every encoder.
        normalize: ``l2`` or ``layernorm``: see `mmrep.model.MultimodalModel`.
        share: Modality -> the modality whose encoder it uses too.
        lr: Peak learning rate.
        weight_decay: Of weight matrices; biases, norms, scales and prototypes are not decayed.
        warmup_steps: Steps of linear warm-up, before the cosine.
        optimizer: ``adamw``, ``lars`` or ``larc``: see `mmrep.modules.optim.make_optimizer`.
        freeze: Names of what is not trained, with ``*`` for anything, as ``[image.tower]``: see
            `mmrep.modules.freezing.freeze_parameters`.
        layer_decay: What the learning rate is multiplied with from layer to layer towards the input of each encoder; 1 for
            one rate: see `mmrep.modules.freezing.depth_scales`.
        micro_batch_size: A rank's batch goes through the encoders in parts of so many samples, which bounds memory; the loss,
            its negatives and all gradients are those of the whole batch. Null for one part: see
            `mmrep.modules.gradient_caching.GradientCaching`.
        kept_micro_batches: So many parts of each modality keep their activations and are not computed again.
        activation_checkpointing: Whether the encoders' blocks are computed again in the backward pass, and not kept: see
            `mmrep.encoders.activation_checkpointing`.
        compile: Whether the encoders are compiled; or by which backend of ``torch.compile``, ``inductor`` by default.
    """

    def __init__(
        self,
        encoders: dict[str, Callable[[int], Encoder]],
        make_loss: Callable[[list[str], int], Loss],
        *,
        embed_dim: int = 128,
        normalize: str = "l2",
        share: dict[str, str] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 100,
        optimizer: str = "adamw",
        freeze: list[str] | None = None,
        layer_decay: float = 1.0,
        micro_batch_size: int | None = None,
        kept_micro_batches: int = 0,
        activation_checkpointing: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        check_choice("optimizer", optimizer, OPTIMIZERS)
        caching = make_caching(micro_batch_size, kept_micro_batches)
        backend = check_backend(compile)
        loss = make_loss([*encoders, *(share or {})], embed_dim)
        built = {name: encoder(embed_dim) for name, encoder in encoders.items()}
        self.model = MultimodalModel(built, loss, normalize=normalize, share=share)
        self.lr, self.weight_decay, self.warmup_steps, self.optimizer = lr, weight_decay, warmup_steps, optimizer
        self.layer_decay, self.frozen = layer_decay, sorted(freeze_parameters(self.model, freeze or ()))
        depth_scales(self.model, layer_decay)  # refuses a bad value before anything is read
        keep_frozen_in_eval(self.model)
        self.caching = caching
        prepare_encoders(self.model, caching, activation_checkpointing=activation_checkpointing, backend=backend)
        self._collector = EmbeddingCollector()
        self.retrieved: dict[str, dict[str, Any]] = {}
        """Figures of the last validation, as `mmrep.evaluation.retrieval.retrieve` gives."""
        self._random_seed: int | None = None
        self._faults = torch.zeros(())  # corrupt samples met by all ranks since the run began or went on
        self.stop_asked = False  # this rank was told to stop, by a signal
        self.stop_agreed = False  # a rank was, and all ranks know it since the same step
        self.save_asked = False  # a checkpoint is due, by the clock of the first rank
        self.save_agreed = False  # all ranks know that since the same step

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = self.model(batch.inputs, self.caching)
        return rows

    def train(self, mode: bool = True) -> ContrastiveModule:
        """Training mode, except for what is frozen."""
        super().train(mode)
        keep_frozen_in_eval(self.model)
        return self

    def on_fit_start(self) -> None:
        if any(not parameter.requires_grad for parameter in self.model.parameters()):  # as asked for
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
        if self.caching is not None:
            refuse_changing_state(self.model)
        warn_of_accumulation(self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        if self._random_seed is None:
            self._random_seed = torch.initial_seed()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout and masks of a step depend on the step alone, so that a run that goes on draws what it would have drawn.
        step = f"{self._random_seed} {self.trainer.current_epoch} {batch_idx} {rank()}"
        seed_random_numbers(stable_hash(step), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with timed(ENCODERS_FORWARD):
            rows = self(batch)
        mark_backward(rows, several_ranks=world_size() > 1)
        with timed(LOSS_FORWARD):
            output = self._loss(batch, rows)
        whole, counts = over_ranks(output, faults=len(batch.faults), stops=self.stop_asked, saves=self.save_asked)
        self._faults = counts["faults"] + self._faults
        finite, stop, save = torch.stack([whole.loss.isfinite(), counts["stops"] > 0, counts["saves"] > 0]).tolist()
        self.stop_agreed, self.save_agreed = self.stop_agreed or stop, self.save_agreed or save
        if not finite:  # of all ranks together: one that stopped alone would leave the others waiting
            raise LossError(
                f"the loss is {float(whole.loss)} at step {self.global_step}", fix="lower model.init_args.lr"
            )
        self._log("train", replace(whole, metrics={**whole.metrics, "faults": self._faults}), len(batch))
        if is_log_step(self.trainer, self.global_step + 1):
            self._log_geometry("train", rows, batch.present)
        return output.loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.model.loss.before_optimizer_step()

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
        self._log_whole_split("val")

    def on_test_epoch_end(self) -> None:
        self._log_whole_split("test")

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(
            self.optimizer,
            self,
            self.model.loss.not_decayed(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            scales=depth_scales(self.model, self.layer_decay),
        )
        planned = self.trainer.estimated_stepping_batches
        schedule = Schedule(optimizer, warmup_cosine(self.warmup_steps, int(planned) if math.isfinite(planned) else 0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY], checkpoint[FILES_KEY] = self.model.config(), self.model.files()
        checkpoint[SEED_KEY] = self._random_seed
        checkpoint[TRAINED_KEY] = {"frozen": self.frozen, "layer_decay": self.layer_decay}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        self._refuse_averages(checkpoint)
        self._random_seed = checkpoint.get(SEED_KEY)

    def _refuse_averages(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on from averaged weights with the state of an optimiser that led to others."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or "current_model_state" not in checkpoint:
            return
        if not any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]  # a list
            raise CheckpointError(
                "the checkpoint's weights are averages, and no callback takes up those that were trained",
                fix="add mmrep.modules.callbacks.EMA to trainer.callbacks again",
            )

    def check_checkpoint(self, checkpoint: dict[str, Any], where: object = None) -> None:
        """Refuse a checkpoint whose model is not this one.

        Raises:
            CheckpointError: With the first few differences.
        """
        if CONFIG_KEY not in checkpoint:
            raise CheckpointError("not a checkpoint of mmrep", where=where, fix="give a file that `mmrep fit` wrote")
        differences = _differences(checkpoint[CONFIG_KEY], self.model.config())
        if self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING:  # evaluation needs no optimiser
            theirs = checkpoint.get(TRAINED_KEY, {"frozen": [], "layer_decay": 1.0})
            ours = {"frozen": self.frozen, "layer_decay": self.layer_decay}
            differences += _differences(_summary(theirs), _summary(ours), "training")
        if differences:
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
        real = sum(bool(key) for key in batch.keys)
        output, counts = over_ranks(self._loss(batch, rows), real=real, stops=self.stop_asked)
        self.stop_agreed |= bool(counts["stops"] > 0)
        if output.parts:  # none of a batch of padding, nor of SwAV's where a picture comes once
            self._log(stage, output, int(counts["real"]))
        self._collector.add(batch, rows)

    def _log(self, stage: str, output: LossOutput, size: int) -> None:
        """Log what is equal on all ranks: Lightning's own way over ranks costs two collectives a figure."""
        self.log(f"{stage}/loss", output.loss, prog_bar=True, batch_size=size)
        parts = {f"{stage}/loss/{name}": value for name, value in output.parts.items()}
        log_figures(
            self, parts | {f"{stage}/{name}": value for name, value in output.metrics.items()}, size, begun=True
        )

    def _log_geometry(self, stage: str, rows: dict[str, Tensor], present: dict[str, Tensor]) -> None:
        """Alignment, uniformity and modality gap of the global batch; a collective."""
        first = {name: (r if r.ndim == 2 else r[:, 0]).detach() for name, r in rows.items()}
        gathered = gather_embeddings(first, {name: present[name] for name in rows})
        found = geometry(gathered.rows, gathered.present)
        log_figures(self, {f"{stage}/{name}": value for name, value in found.items()}, begun=True)

    def _log_whole_split(self, stage: str) -> None:
        """Retrieval in every direction, each sample once, the queries shared by the ranks; and the geometry."""
        embeddings = self._collector.gathered(self.device)
        figures: dict[str, Any] = dict(geometry(embeddings.rows, embeddings.present))
        self.retrieved = retrieve(embeddings, self.model.loss)
        for direction, found in self.retrieved.items():
            figures |= {f"{direction}/{name}": found[name] for name in ("recall@1", "recall@5", "recall@10", "mrr")}
        log_figures(self, {f"{stage}/{name}": value for name, value in figures.items() if value is not None})


def seed_random_numbers(seed: int, device: torch.device) -> None:
    """`torch.manual_seed`, which formats the call stack for every kind of device that is not there, .5 ms a step."""
    seeding = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    seeding(seed)


def over_ranks(output: LossOutput, **counts: int) -> tuple[LossOutput, dict[str, Tensor]]:
    """Loss and parts of the whole batch, detached: the means over the ranks, in one collective.

    With them go the sums over the ranks of ``counts``, by name.
    """
    loss = output.loss.detach()
    everything = sum_over_ranks(torch.stack([loss, *output.parts.values(), *loss.new_tensor(list(counts.values()))]))
    means = everything[: len(everything) - len(counts)] / world_size()
    whole = LossOutput(means[0], dict(zip(output.parts, means[1:], strict=True)), output.metrics)
    return whole, dict(zip(counts, everything[len(means) :], strict=True))


def _summary(trained: dict[str, Any]) -> dict[str, Any]:
    """Without a list of hundreds of names: how many are frozen, and under what."""
    names = trained["frozen"]
    parts = sorted({".".join(name.split(".")[:3]) for name in names})
    return {
        "layer_decay": trained["layer_decay"],
        "frozen": f"{len(names)} parameters of {', '.join(parts) or 'nothing'}",
    }


def _differences(theirs: Any, ours: Any, path: str = "model") -> list[str]:
    """Where two plain configs differ, a line each."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [line for key in keys for line in _differences(theirs.get(key), ours.get(key), f"{path}.{key}")]
    return [] if theirs == ours else [f"{path} is {theirs!r} there and {ours!r} here"]
