"""The benchmarks of large batches: what they measure, their gates, and that the page says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks import gradient_caching, step_gpu
from benchmarks.step_gpu import TINY, Machine, largest_batch, mmrep_training, open_clip_training

ROOT = Path(__file__).parents[2]
RESULT = ROOT / gradient_caching.RESULT


def committed() -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["case"], row["metric"]): row for row in json.loads(RESULT.read_text())["rows"]}


def test_the_committed_result_has_every_case_and_its_gates() -> None:
    found = committed()
    assert {case for case, _ in found} == set(gradient_caching.CASES)
    for case in gradient_caching.CASES:
        for metric, gates in (("CPU s", gradient_caching.TIME_GATES), ("peak MiB", gradient_caching.MEMORY_GATES)):
            row = found[case, metric]
            assert row["gate"] == gates.get(case) and row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
            assert row["held"] == (None if row["gate"] is None else row["ratio"] <= row["gate"])
    assert found["8 parts", "peak MiB"]["held"]


def test_the_page_says_what_was_measured() -> None:
    page, found = (ROOT / "docs/large_batches.md").read_text(), committed()
    for case in gradient_caching.CASES:
        time, memory = found[case, "CPU s"]["ratio"], found[case, "peak MiB"]["ratio"]
        assert f"| {case} | {time:.2f} | {memory:.2f} |" in page, case


def first_gradient(train: step_gpu.Train) -> torch.Tensor:
    """The gradient of the first step, one vector; the step must move every weight that has one."""
    found: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        weights.extend(p.detach().clone() for p in trained)
        found.append(torch.cat([p.grad.flatten().clone() for p in trained if p.grad is not None]))

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        assert all(not p.grad.any() or not torch.equal(p, was) for p, was in zip(trained, weights, strict=True))

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        train(1)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(found) == 1, "one step of the optimiser"
    return found[0]


def test_the_steps_of_the_gpu_run_train() -> None:
    """On the CPU: each side makes one step of the optimiser from a gradient; in parts it is that of one graph."""
    machine = Machine("cpu", TINY)
    whole, parts = first_gradient(mmrep_training(machine, 8)), first_gradient(mmrep_training(machine, 8, 2))
    assert torch.cosine_similarity(whole, parts, dim=0) > 0.999  # bf16
    for accum_freq in (1, 4):
        theirs = first_gradient(open_clip_training(machine, 8, accum_freq))
        assert theirs.isfinite().all() and theirs.norm() > 0


def test_the_gpu_script_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    words = ["--device", "cpu", "--tiny", "--limit", "32", "--rounds", "1", "--out", str(out)]
    assert step_gpu.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["theirs_is"]) for row in rows] == [
        ("largest batch in one graph", "open_clip"),
        ("batch 32, one graph", "open_clip"),
        ("batch 32, 8 parts", "open_clip, one graph"),
        ("batch 128, parts of 16", "open_clip, accum-freq 8"),
    ]
    assert rows[0]["ours"] == rows[0]["theirs"] == 32 and all(row["ours"] > 0 for row in rows)
    if not torch.cuda.is_available():
        assert step_gpu.main([]) == 2 and "no GPU here" in capsys.readouterr().err


def test_the_largest_batch_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_gpu, "_free", lambda: None)

    def make(batch: int) -> step_gpu.Train:
        def train(steps: int) -> None:
            if batch > 100:
                raise torch.OutOfMemoryError("no")

        return train

    assert largest_batch(make, 16, 2**20) == 64 and largest_batch(make, 16, 32) == 32
    with pytest.raises(MemoryError, match="a batch of 128 does not fit"):
        largest_batch(make, 128, 2**20)
