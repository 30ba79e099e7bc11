"""Zero-shot figures while a model is trained: the command's own, once for every sample, on any number of ranks."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from mmrep.cli import main
from mmrep.data.datamodule import ShardDataModule
from mmrep.data.faults import read_quarantine
from mmrep.encoders import ConvImageEncoder, MelAudioEncoder, NgramTextEncoder
from mmrep.errors import ConfigError, DataError, MmrepError, SampleError
from mmrep.losses import PairwiseCLIPLoss
from mmrep.model import MultimodalModel
from mmrep.modules import PairwiseCLIP
from mmrep.modules.callbacks import KNNProbe
from mmrep.modules.callbacks.zero_shot_evaluation import ZeroShotEvaluation
from tests.data.test_faults import damage
from tests.gloo_pool import GlooPool
from tests.modules.callbacks.small_runs import as_rank, data, module, trainer

ENCODERS: dict[str, Any] = {
    "image": lambda d: ConvImageEncoder(d, image_size=16, width=8),
    "text": lambda d: NgramTextEncoder(d, width=16, buckets=99, length=32),
    "audio": lambda d: MelAudioEncoder(d, seconds=0.2, width=8),
}


def model() -> MultimodalModel:
    torch.manual_seed(0)
    return MultimodalModel({name: make(8) for name, make in ENCODERS.items()}, PairwiseCLIPLoss()).eval()


def callbacks(shards: Path) -> list[ZeroShotEvaluation]:
    return [
        ZeroShotEvaluation(str(shards), "classification", name="images", batch_size=3, language="en"),
        ZeroShotEvaluation(str(shards), "classification", name="both", batch_size=3, modality="audio+image"),
        ZeroShotEvaluation(str(shards), "retrieval", batch_size=4, directions=["text->image", "audio+text->image"]),
    ]


def figures(shards: Path) -> list[dict[str, float]]:
    return [callback.evaluate(model()) for callback in callbacks(shards)]


def test_figures_are_those_of_the_command(tiny_shards: Path, tmp_path: Path) -> None:
    folder = model().save_pretrained(tmp_path / "model")
    common = ["--checkpoint", str(folder), "--data", str(tiny_shards), "--device", "cpu"]
    assert main(["eval", "classification", *common, "--language", "en", "--out", str(tmp_path / "c.json")]) == 0
    assert main(["eval", "retrieval", *common, "--out", str(tmp_path / "r.json")]) == 0
    images, _, retrieval = figures(tiny_shards)
    expected = json.loads((tmp_path / "c.json").read_text())
    assert images == {name: expected[name] for name in ("acc1", "acc5", "mean_per_class_recall")}
    directions = json.loads((tmp_path / "r.json").read_text())["directions"]
    assert retrieval and all(directions[k.split("/")[0]][k.split("/")[1]] == v for k, v in retrieval.items())
    assert {key.split("/")[0] for key in retrieval} == {"text->image", "audio+text->image"}


def rank_figures(rank: int, shards: Path) -> list[dict[str, float]]:
    return figures(shards)


def test_every_rank_logs_what_one_process_would(tiny_shards: Path, pool2: GlooPool, pool3: GlooPool) -> None:
    alone = figures(tiny_shards)
    for pool in (pool2, pool3):
        for found in pool.run(rank_figures, [(rank, tiny_shards) for rank in range(pool.world)]):
            assert found == alone


def test_a_run_logs_the_figures_every_second_epoch(tiny_shards: Path, tmp_path: Path) -> None:
    module = PairwiseCLIP(ENCODERS, embed_dim=8, lr=5e-3, warmup_steps=1)
    chosen = pl.callbacks.ModelCheckpoint(
        tmp_path / "checkpoints", monitor="eval/images/acc1", mode="max", filename="{epoch}", every_n_epochs=2
    )
    for callback in (evaluations := callbacks(tiny_shards)):
        callback.every_n_epochs = 2
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=pl.loggers.CSVLogger(tmp_path, name="", version=""), enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=[*evaluations, chosen], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, ShardDataModule(str(tiny_shards), global_batch_size=16, num_workers=0))
    assert module.training or not module.model.training
    logged = trainer.callback_metrics
    name = tiny_shards.name
    for key in (
        "eval/images/acc1",
        "eval/both/acc5",
        f"eval/{name}/text->image/recall@1",
        f"eval/{name}/text->image/mrr",
    ):
        assert key in logged, sorted(logged)
    assert chosen.best_model_path.endswith("epoch=1.ckpt")
    with (tmp_path / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["epoch"] for line in lines if line["eval/images/acc1"]} == {"1"}, "of epochs 0, 1 and 2"


def test_mistakes_are_found_before_the_first_step(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task='classify'"):
        ZeroShotEvaluation(str(tiny_shards), "classify")
    with pytest.raises(ConfigError, match="every_n_epochs=0"):
        ZeroShotEvaluation(str(tiny_shards), every_n_epochs=0)
    module = PairwiseCLIP(ENCODERS, embed_dim=8)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"data": str(tmp_path / "nothing")}, "index.json"),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"directions": ["text->imgae"]}, "did you mean 'image'"),
        ({"task": "classification", "label": "lable"}, "did you mean 'label'"),
        ({"task": "classification", "label": "label", "modality": "imgae"}, "did you mean 'image'"),
        ({"task": "classification", "label": "label", "text_modality": "audio"}, "cannot take the prompts"),
    ]
    for options, message in wrong:
        callback = ZeroShotEvaluation(**{"data": str(tiny_shards), **options})
        with pytest.raises(MmrepError, match=message):
            callback.setup(pl.Trainer(accelerator="cpu", logger=False), module, "fit")


def test_a_corrupt_sample_ends_an_evaluation_and_no_run(tiny_shards: Path, tmp_path: Path) -> None:
    """As in the run's own validation: it is left out there and listed, and refused by a command."""
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    damage(shards, {"val-0-0002": "png", "train-0-0001": "png"})
    watched = [ZeroShotEvaluation(str(shards), split="val"), KNNProbe("image", data=str(shards))]
    run = trainer(tmp_path, 1, *watched)
    listed = tmp_path / "quarantine.csv"
    run.fit(module(), data(tiny_shards, eval_path=str(tiny_shards), max_bad_fraction=0.1, quarantine=str(listed)))
    assert {(fault.key, fault.reason) for fault in read_quarantine(listed)} == {
        ("val-0-0002", "checksum"),
        ("train-0-0001", "checksum"),
    }
    assert {"eval/shards/text->image/recall@1", "eval/knn_image/acc1"} <= run.callback_metrics.keys()
    for callback in watched:
        with pytest.raises(SampleError, match="checksum differs"):
            callback.evaluate(module().model)


def test_too_many_corrupt_samples_end_the_run_on_all_ranks(tiny_shards: Path, tmp_path: Path, pool2: GlooPool) -> None:
    """Two samples, one to each rank, where one may be corrupt."""
    shards = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    damage(shards, {"val-0-0000": "png", "val-0-0001": "png"})
    for message in pool2.run(run_to_its_end, [(rank, tiny_shards, shards, tmp_path / str(rank)) for rank in range(2)]):
        assert message.startswith("2 samples cannot be used, more than the 1 of data.max_bad_fraction=0.01 (")


def run_to_its_end(rank: int, shards: Path, damaged: Path, folder: Path) -> str:
    with as_rank(rank, 2) as launcher:
        run = trainer(folder, 1, ZeroShotEvaluation(str(damaged), split="val", batch_size=1), **launcher)
        with pytest.raises(DataError) as stopped:
            run.fit(module(), data(shards, max_bad_fraction=0.01))
    return str(stopped.value)
