"""The best checkpoints are the best, a run stops when it should, and a misspelt figure is told at once."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import mmrep
from mmrep.cli import main
from mmrep.errors import ConfigError
from mmrep.files import replacing
from mmrep.modules.callbacks import EMA, KNNProbe, MonitoredCheckpoint, MonitoredStopping, ZeroShotEvaluation
from mmrep.modules.fault_tolerance import checkpoint_io
from tests.gloo_pool import GlooPool
from tests.modules.callbacks.small_runs import Scripted, as_rank, data, module, trainer

NAMES: dict[str, Any] = {"filename": "epoch={epoch}", "auto_insert_metric_name": False}


def epochs_of(folder: Path) -> set[int]:
    return {int(path.stem.split("=")[1]) for path in folder.glob("epoch=*.ckpt")}


def test_the_best_k_are_kept_and_the_last_is_always_the_last(tiny_shards: Path, tmp_path: Path) -> None:
    values = [0.3, 0.9, 0.1, 0.7, 0.2, 0.8, 0.4]
    chosen = MonitoredCheckpoint(
        tmp_path / "c", monitor="eval/scripted/acc1", mode="max", save_top_k=3, save_last=True, **NAMES
    )
    trainer(tmp_path, 7, Scripted(values), chosen).fit(module(), data(tiny_shards))
    assert epochs_of(tmp_path / "c") == {1, 3, 5}
    assert Path(chosen.best_model_path).name == "epoch=1.ckpt" and float(chosen.best_model_score or 0) == pytest.approx(
        0.9
    )
    last = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 6, "also where it is not among the best"


def test_a_figure_of_every_second_epoch_is_waited_for(tiny_shards: Path, tmp_path: Path) -> None:
    """Epochs 1, 3, 5, ... have one; by Lightning's own, epoch 2 would be kept for the figure of epoch 1."""
    scripted = Scripted([0.5, 0.9, 0.7, 0.6, 0.8], every_n_epochs=2)
    chosen = MonitoredCheckpoint(
        tmp_path / "c", monitor="eval/scripted/acc1", mode="max", save_top_k=2, save_last=True, **NAMES
    )
    stop = MonitoredStopping("eval/scripted/acc1", mode="max", patience=2)
    run = trainer(tmp_path, 20, stop, scripted, chosen)
    run.fit(module(), data(tiny_shards))
    assert epochs_of(tmp_path / "c") == {3, 5}
    assert run.current_epoch == 8 and stop.stopped_epoch == 7, "after the figures 0.7 and 0.6 of epochs 5 and 7"


def stopped_at(rank: int, world: int, shards: Path, folder: Path) -> tuple[int, int, set[int]]:
    stop = MonitoredStopping("eval/scripted/acc1", mode="max", patience=2)
    chosen = MonitoredCheckpoint(folder / "c", monitor="eval/scripted/acc1", mode="max", save_top_k=2, **NAMES)
    with as_rank(rank, world) as options:
        run = trainer(folder, 9, Scripted([0.5, 0.9, 0.7, 0.6, 0.8]), stop, chosen, **options)
        run.fit(module(), data(shards))
    return run.current_epoch, run.global_step, epochs_of(folder / "c")


def test_two_ranks_stop_at_the_same_epoch(tiny_shards: Path, tmp_path: Path, pool2: GlooPool) -> None:
    found = pool2.run(stopped_at, [(rank, 2, tiny_shards, tmp_path) for rank in range(2)], timeout=120)
    assert found == [(4, 12, {1, 2})] * 2


@pytest.mark.parametrize(("interval", "choices"), [(1.0, [3, 6, 9]), (2, [2, 5, 8])])
def test_by_steps_the_last_is_written_and_the_best_chosen_by_new_figures(
    interval: Any, choices: list[int], tiny_shards: Path, tmp_path: Path
) -> None:
    """Lightning would choose step 4 by the figure of step 3, and write nothing before it."""
    values = [0.1, 0.9, 0.3]
    chosen = MonitoredCheckpoint(
        tmp_path / "c",
        monitor="eval/scripted/acc1",
        mode="max",
        every_n_train_steps=2,
        save_top_k=-1,
        save_last=True,
        filename="step={step}",
        auto_insert_metric_name=False,
    )
    lasts: list[int] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            path = tmp_path / "c" / "last.ckpt"
            lasts.append(torch.load(path, weights_only=True)["global_step"] if path.exists() else 0)

    run = trainer(tmp_path, 3, Scripted(values), Look(), chosen, val_check_interval=interval)
    run.fit(module(), data(tiny_shards))
    found = {int(Path(path).stem.split("=")[1]): float(value) for path, value in chosen.best_k_models.items()}
    assert found == pytest.approx(dict(zip(choices, values, strict=True)))
    assert lasts == ([0, 0, 2, 3, 4, 4, 6, 6, 8] if interval == 1.0 else [0, 0, 2, 2, 4, 5, 6, 6, 8])
    for option, name in (
        ({"train_time_interval": timedelta(minutes=1)}, "train_time"),
        ({"every_n_train_steps": 2}, "last"),
    ):
        wrong = MonitoredCheckpoint(tmp_path, monitor="val/loss", save_last="link", **option)
        with pytest.raises(ConfigError, match=name):
            trainer(tmp_path, 1, wrong).fit(module(), data(tiny_shards))


def best(folder: Path, **options: Any) -> MonitoredCheckpoint:
    """Of a figure that `Scripted` logs, and the last."""
    return MonitoredCheckpoint(folder, monitor="eval/scripted/acc1", mode="max", save_last=True, **{**NAMES, **options})


def kept_by(chosen: MonitoredCheckpoint) -> dict[int, float]:
    return {int(Path(path).stem.split("=")[1]): round(float(value), 3) for path, value in chosen.best_k_models.items()}


def best_of_a_disk_that_is_full_in_epoch_1(
    rank: int, world: int, shards: Path, folder: Path, values: Sequence[float], names: dict[str, Any]
) -> tuple[list[float], str, set[str]]:
    chosen = best(folder / "c", **names)
    with as_rank(rank, world) as options, pytest.MonkeyPatch.context() as patch:
        disk = checkpoint_io.DurableCheckpointIO()
        run = trainer(folder, 4, Scripted(values), chosen, plugins=[disk], **options)

        def write(path: Path, *, sync: bool) -> Any:
            if run.current_epoch == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return replacing(path, sync=sync)

        patch.setattr(checkpoint_io, "replacing", write)
        run.fit(module(), data(shards))
        disk.check()
    figures = [round(float(value), 3) for value in chosen.best_k_models.values()]
    return figures, Path(chosen.best_model_path).name, {path.name for path in (folder / "c").iterdir()}


@pytest.mark.parametrize(
    ("values", "names", "figure", "name"),
    [
        ([0.2, 0.3, 0.1, 0.15], {}, 0.2, "epoch=0.ckpt"),
        ([0.2, 0.9, 0.3, 0.1], {}, 0.3, "epoch=2.ckpt"),
        ([0.2, 0.3, 0.1, 0.15], {"filename": "best"}, 0.2, "best.ckpt"),
    ],
    ids=["the earlier stays", "a later one takes its place", "under one name"],
)
def test_a_best_checkpoint_that_cannot_be_written_is_none(
    values: list[float],
    names: dict[str, Any],
    figure: float,
    name: str,
    tiny_shards: Path,
    tmp_path: Path,
    pool2: GlooPool,
) -> None:
    arguments = [(rank, 2, tiny_shards, tmp_path, values, names) for rank in range(2)]
    found = pool2.run(best_of_a_disk_that_is_full_in_epoch_1, arguments, timeout=120)
    assert found == [([figure], name, {name, "last.ckpt"})] * 2


@pytest.mark.parametrize(("gone", "kept"), [(None, {0: 0.9, 2: 0.7}), ("epoch=0.ckpt", {1: 0.5, 2: 0.7})])
def test_a_folder_that_was_moved_keeps_its_best(
    gone: str | None, kept: dict[int, float], tiny_shards: Path, tmp_path: Path
) -> None:
    values, moved = [0.9, 0.5, 0.7, 0.1], tmp_path / "moved"
    trainer(tmp_path, 2, Scripted(values), best(tmp_path / "c", save_top_k=2)).fit(module(), data(tiny_shards))
    (tmp_path / "c").rename(moved)
    if gone:
        (moved / gone).unlink()
    chosen = best(moved, save_top_k=2)
    trainer(tmp_path, 4, Scripted(values), chosen).fit(module(), data(tiny_shards), ckpt_path=moved / "last.ckpt")
    assert kept_by(chosen) == kept and epochs_of(moved) == set(kept)
    epoch = max(kept, key=lambda epoch: kept[epoch])
    assert chosen.best_model_path == str(moved / f"epoch={epoch}.ckpt")
    assert float(chosen.best_model_score or 0) == pytest.approx(kept[epoch])
    assert [path.name for path in moved.glob("last*")] == ["last.ckpt"] and not (tmp_path / "c").exists()


def test_a_run_that_was_stopped_trains_no_more_unless_it_is_given_more_patience(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [0.5, 0.4, 0.3, 0.9, 0.2, 0.1, 0.1]

    def start(patience: int, folder: str = "c", **options: Any) -> tuple[int, bool]:
        begun: list[int] = []

        class Look(pl.Callback):
            def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                begun.append(trainer.global_step)

        stop = MonitoredStopping("eval/scripted/acc1", mode="max", patience=patience)
        run = trainer(tmp_path, 9, Scripted(values), stop, best(tmp_path / folder), Look())
        run.fit(module(), data(tiny_shards), **options)
        return run.global_step, bool(begun)

    last = {"ckpt_path": tmp_path / "c" / "last.ckpt"}
    assert start(2) == (9, True)
    assert start(2, "other", **last)[1], "another run, from the checkpoint of one that is complete"
    assert "stopped early" not in capsys.readouterr().out
    assert start(2, **last) == (9, False)
    assert "the run had stopped early (eval/scripted/acc1: patience exhausted)" in capsys.readouterr().out
    assert start(3, **last) == (21, True), "0.9 of epoch 3, and three that are less"
    assert start(3, **last) == (21, False)


def knn(**options: Any) -> KNNProbe:
    return KNNProbe("image", **options)


@pytest.mark.parametrize(
    ("monitor", "message"),
    [
        ("eval/knn_image/ac1", "no callback logs 'eval/knn_image/ac1'.*did you mean 'eval/knn_image/acc1'"),
        ("eval/knn/acc1", "did you mean 'eval/knn_image/acc1'"),
        (
            "eval/zs/text->image/recal@1",
            r"did you mean 'eval/zs/text->image/recall@1'\? there are: .*eval/zs/text->image/mrr",
        ),
    ],
)
def test_a_misspelt_figure_of_a_callback_is_told_before_the_first_step(
    monitor: str, message: str, tiny_shards: Path, tmp_path: Path
) -> None:
    zero_shot = ZeroShotEvaluation(str(tiny_shards), name="zs", every_n_epochs=2)
    watchers: list[pl.Callback] = [MonitoredCheckpoint(tmp_path, monitor=monitor), MonitoredStopping(monitor)]
    for watcher in watchers:  # the early stop comes before the callbacks that log
        run = trainer(tmp_path, 1, watcher, knn(every_n_epochs=5), zero_shot)
        with pytest.raises(ConfigError, match=message):
            run.fit(module(), data(tiny_shards))
        assert run.global_step == 0


def test_a_misspelt_figure_of_the_module_is_told_at_the_first_validation(tiny_shards: Path, tmp_path: Path) -> None:
    wrong = "val/text->imgae/recall@1"
    watchers: list[pl.Callback] = [MonitoredCheckpoint(tmp_path, monitor=wrong), MonitoredStopping(wrong)]
    for watcher in watchers:
        run = trainer(tmp_path, 3, watcher, num_sanity_val_steps=1)
        with (
            pytest.warns(UserWarning, match="the sanity check logged no 'val/text->imgae/recall@1'"),
            pytest.raises(ConfigError, match=r"did you mean 'val/text->image/recall@1'\? there are: .*val/loss"),
        ):
            run.fit(module(), data(tiny_shards))
        assert run.current_epoch == 0


def test_a_slash_in_a_figure_makes_no_folder(tiny_shards: Path, tmp_path: Path) -> None:
    named = "{epoch}-{val/text->image/recall@1:.3f}-{eval/scripted/acc1:.2f}"
    chosen = MonitoredCheckpoint(tmp_path / "c", filename=named, monitor="eval/scripted/acc1", mode="max")
    trainer(tmp_path, 1, Scripted([0.25]), chosen).fit(module(), data(tiny_shards))
    (found,) = (tmp_path / "c").iterdir()
    assert found.name.startswith("epoch=0-val_text->image_recall@1=0.") and found.name.endswith(
        "-eval_scripted_acc1=0.25.ckpt"
    )


def test_two_callbacks_that_log_alike_are_refused(tiny_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two callbacks log 'eval/knn_image/acc1'.*give one a 'name'"):
        trainer(tmp_path, 1, knn(), knn(k=5)).fit(module(), data(tiny_shards))
    with pytest.raises(ConfigError, match="every_n_epochs=0"):
        knn(every_n_epochs=0)


def test_a_filename_that_cannot_be_filled_in_is_told_before_the_first_step(tiny_shards: Path, tmp_path: Path) -> None:
    for wrong in ("{nope", "{epoch:day}"):
        with pytest.raises(ConfigError, match="names no file"):
            trainer(tmp_path, 1, MonitoredCheckpoint(tmp_path, filename=wrong)).fit(module(), data(tiny_shards))


CONFIG = """
seed_everything: 1
model:
  class_path: mmrep.modules.PairwiseCLIP
  init_args:
    embed_dim: 8
    lr: 1e-2
    warmup_steps: 1
    encoders:
      image: {{class_path: mmrep.encoders.ConvImageEncoder, init_args: {{image_size: 16, width: 8}}}}
      text: {{class_path: mmrep.encoders.NgramTextEncoder, init_args: {{width: 16, buckets: 99, length: 32}}}}
data: {{path: {shards}, global_batch_size: 16, num_workers: 0}}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 3
  callbacks:
    - {{class_path: mmrep.modules.callbacks.EMA, init_args: {{decay: 0.9, warmup: true}}}}
    - {{class_path: mmrep.modules.callbacks.KNNProbe, init_args: {{modality: image, label: label}}}}
    - {{class_path: mmrep.modules.callbacks.OnlineLinearProbe, init_args: {{modality: image, label: label}}}}
    - {{class_path: mmrep.modules.callbacks.MonitoredStopping, init_args: {{monitor: eval/knn_image/acc1, mode: max}}}}
"""


def test_the_command_keeps_the_best_by_a_callbacks_figure(tiny_shards: Path, tmp_path: Path) -> None:
    config = tmp_path / "watched.yaml"
    config.write_text(CONFIG.format(shards=tiny_shards))
    words = ["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), "--checkpoint.mode", "max"]
    words += ["--checkpoint.save_top_k", "2", "--checkpoint.monitor"]
    assert main([*words, "eval/knn_image/acc2"]) == 2
    assert main([*words, "eval/knn_image/acc1", "--overwrite"]) == 0
    run = tmp_path / "runs" / "watched"
    kept = list((run / "checkpoints").glob("epoch=*.ckpt"))
    assert len(kept) == 2 and (run / "checkpoints" / "last.ckpt").is_file()
    states = {
        path: state["best_model_path"]
        for path in [run / "checkpoints" / "last.ckpt"]
        for key, state in torch.load(path, weights_only=True)["callbacks"].items()
        if "Checkpoint" in key
    }
    best = mmrep.load(next(iter(states.values())))
    model = mmrep.load(run)
    for name, tensor in best.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert main([*words, "eval/knn_image/acc1", "--resume", "auto", "--trainer.max_epochs", "4"]) == 0


def test_averages_and_best_checkpoints_agree_on_the_weights(tiny_shards: Path, tmp_path: Path) -> None:
    """The figure that a checkpoint is chosen by is that of what `mmrep.load` gives."""
    probe, chosen = (
        knn(),
        MonitoredCheckpoint(tmp_path / "c", monitor="eval/knn_image/acc1", mode="max", filename="best"),
    )
    trainer(tmp_path, 4, EMA(0.9), probe, chosen).fit(module(), data(tiny_shards))
    assert probe.evaluate(mmrep.load(tmp_path / "c" / "best.ckpt"))["acc1"] == pytest.approx(
        float(chosen.best_model_score or 0)
    )
