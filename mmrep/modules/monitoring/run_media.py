"""`RunMedia`: the config, the retrieval table and a page of examples, where TensorBoard or wandb shows the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from mmrep.data.datamodule import ShardDataModule
from mmrep.data.dataset import ShardDataset, make_loader
from mmrep.data.html_page import table, write_page
from mmrep.data.reader import Samples
from mmrep.errors import MmrepError
from mmrep.evaluation.embeddings import embed_loader
from mmrep.evaluation.examples_page import examples
from mmrep.evaluation.html_report import STYLE
from mmrep.evaluation.report import HEADINGS, retrieval_cells
from mmrep.evaluation.retrieval import Direction
from mmrep.model import MultimodalModel
from mmrep.modules.callbacks.evaluation import run_precision
from mmrep.modules.fault_tolerance.preemption import PreemptedError
from mmrep.modules.monitoring.tensorboard_logger import DiskSafeTensorBoardLogger
from mmrep.modules.monitoring.wandb_logger import OfflineSafeWandbLogger, first_line

COLUMNS = ("queries", "candidates", "recall@1", "recall@5", "recall@10", "mrr", "median_rank", "chance_recall@1")
"""Of the table at wandb, beside the direction; fractions from 0 to 1."""
GALLERY = 2048
"""The page asks, and answers with, the first so many samples of the validation split."""
BATCH = 128


class RunMedia(pl.Callback):
    """Logs the resolved config at the start, the retrieval table of every validation, the page at the end of the training.

    The page is of the weights that the run ends with: the last step's, or their averages. The first rank makes it, alone.

    Args:
        folder: Of the run: its config.yaml is logged, the page becomes its examples.html.
        queries: Examples of each direction on the page; 0 for no page.
    """

    def __init__(self, folder: Path, queries: int = 4) -> None:
        self.folder, self.queries = folder, queries

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self.folder / "config.yaml"
        if not path.is_file():
            return
        text = path.read_text()
        for logger in trainer.loggers:
            if isinstance(logger, OfflineSafeWandbLogger):
                logger.log_config(yaml.safe_load(text))
            elif isinstance(logger, TensorBoardLogger):
                _log_text(logger, "config", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        retrieved: Mapping[str, Mapping[str, Any]] = getattr(pl_module, "retrieved", {})
        if trainer.sanity_checking or not retrieved:
            return
        shown = [(name, *retrieval_cells(figures)) for name, figures in retrieved.items()]
        for logger in trainer.loggers:
            if isinstance(logger, OfflineSafeWandbLogger):
                rows = [[name, *(figures[column] for column in COLUMNS)] for name, figures in retrieved.items()]
                logger.log_rows("val/retrieval", ("direction", *COLUMNS), rows, table(HEADINGS, shown, (0,)))
            elif isinstance(logger, TensorBoardLogger):
                _log_text(logger, "val/retrieval", markdown(HEADINGS, shown), trainer.global_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, PreemptedError):
            for logger in trainer.loggers:
                if isinstance(logger, OfflineSafeWandbLogger):
                    logger.preempted()

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, OfflineSafeWandbLogger)]
        directions, splits = getattr(pl_module, "retrieved", {}), _validated(trainer)
        if not loggers or not directions or not splits or not self.queries:
            return
        model = pl_module.model
        assert isinstance(model, MultimodalModel), "it has retrieved"
        try:
            with run_precision(trainer):
                page = write_examples(self.folder / "examples.html", model, splits[0], list(directions), self.queries)
        except Exception as error:  # whatever it is, the GPU's memory included: the trained model is yet to be written
            print(f"mmrep: warning: no page of examples: {first_line(error)}", file=sys.stderr)
            return
        for logger in loggers:
            logger.log_page("examples", page.read_text(encoding="utf-8"))


def _log_text(logger: TensorBoardLogger, name: str, text: str, step: int) -> None:
    if isinstance(logger, DiskSafeTensorBoardLogger):
        logger.log_text(name, text, step)
    else:  # of the config: as Lightning made it
        logger.experiment.add_text(name, text, step)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, ["---"] * len(headings), *rows))


@torch.inference_mode()
def write_examples(path: Path, model: MultimodalModel, samples: Samples, directions: list[str], queries: int) -> Path:
    """Write a page of queries, each with its best five answers.

    Args:
        path: Of the page.
        model: In evaluation mode meanwhile.
        samples: The first `GALLERY` of them are asked, and answer.
        directions: As ``audio+text->image``.
        queries: Of each direction.

    Raises:
        MmrepError: If a sample cannot be read.
    """
    encoders, training = model.by_modality, model.training
    loader = make_loader(ShardDataset(samples, encoders, global_batch_size=BATCH), encoders)
    try:
        embeddings = embed_loader(model, islice(loader, GALLERY // BATCH)).to(next(model.parameters()).device)
    finally:
        model.train(training)
    if any(key != samples.key(number) for number, key in enumerate(embeddings.keys)):
        raise MmrepError("some samples of the split are damaged", fix="mmrep data check")
    asked = [Direction.parse(direction, list(encoders)) for direction in directions]
    shown = len(embeddings.keys)
    parts = [
        f'<p class="muted">The first {shown} of {len(samples)} samples of the validation split.</p>\n',
        *examples(embeddings, model, samples, asked, queries),
    ]
    return write_page(path, f"Examples of {path.parent.name}", parts, style=STYLE)


def _validated(trainer: pl.Trainer) -> list[Samples]:
    """What the data module validates on; nothing where it does not, or is another one."""
    module = trainer.datamodule  # type: ignore[attr-defined]  # set by a connector
    return module.validated() if isinstance(module, ShardDataModule) else []
