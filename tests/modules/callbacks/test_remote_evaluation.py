"""Evaluations of shards at a URL keep them where the run does."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmrep.data import shard_cache
from mmrep.modules.callbacks import KNNProbe, ZeroShotEvaluation
from tests.data.server import served
from tests.modules.callbacks.small_runs import data, module, trainer


def test_shards_are_kept_in_the_runs_cache(tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("MMREP_CACHE", str(tmp_path / "default"))
    local = trainer(tmp_path, 1, KNNProbe("image"), ZeroShotEvaluation(name="zero_shot", split="val"))
    local.fit(module(), data(tiny_shards))
    with served(tiny_shards) as (url, behaviour):
        probe, zero_shot = KNNProbe("image", data=url), ZeroShotEvaluation(url, name="zero_shot", split="val")
        run = trainer(tmp_path, 1, probe, zero_shot)
        run.fit(module(), data(tiny_shards, cache_dir=str(tmp_path / "kept")))
    assert list((tmp_path / "kept").glob("*.tar")) and not (tmp_path / "default").exists()
    assert max(count for path, count in behaviour.requests.items() if path.endswith(".tar")) == 1, "each once"
    names = [name for name in local.callback_metrics if name.startswith("eval/")]
    assert names and all(run.callback_metrics[name] == local.callback_metrics[name] for name in names)
