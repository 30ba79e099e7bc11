"""The Triton kernels give the numbers of PyTorch's tiles: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmrep.ops import tiles
from mmrep.ops.paths import choose_path
from mmrep.ops.product_logsumexp import product_logsumexp

pytest.importorskip("triton", reason="triton comes with PyTorch for CUDA")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them even in a small batch."""
    from mmrep.ops import triton_tiles

    monkeypatch.setattr(triton_tiles, "BLOCK", 16)
    monkeypatch.setattr(triton_tiles, "DEPTH", 16)


def results(path: str, sides: dict[str, Tensor], **how: Any) -> list[Tensor]:
    """Values and gradients."""
    sides = {name: side.detach().to(DEVICE).requires_grad_() for name, side in sides.items()}
    how = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in how.items()}
    parts = product_logsumexp(**sides, **how, path=path)
    total = torch.stack(
        [(part.masked_fill(part.isinf(), 0.0) * torch.arange(len(part), device=DEVICE).cos()).sum() for part in parts]
    )
    return [*parts, *torch.autograd.grad(total.sum(), list(sides.values()))]


@pytest.mark.parametrize("rests", [0, 5])
@pytest.mark.parametrize("tile", [24, 1024])
def test_equal_to_pytorchs_tiles(rests: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged blocks, widths and tiles; weights; positives left out; a scale that shifts the exponents."""
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    for weighted, without, scale in itertools.product((False, True), (False, True), (3.0, 90.0)):
        n, columns, width = 9 if rests else 37, 45, 20
        counts = {"x": n, "y": columns, **({"rest": rests} if rests else {})}
        sides = {name: torch.nn.functional.normalize(torch.randn(k, width), dim=1) for name, k in counts.items()}
        sides["scale"] = torch.tensor(scale)
        how: dict[str, Any] = {"offset": 2, "rest_stride": 0, "stride": 3 if rests else 1, "without_positives": without}
        if weighted:
            how["row_weights"] = (torch.arange(n * max(1, rests)) % 3).float()
            how["column_weights"] = (torch.arange(columns) % 2).float()
        for ours, right in zip(results("triton", sides, **how), results("tiled", sides, **how), strict=True):
            assert torch.equal(ours.isinf(), right.isinf())
            ours, right = (part.masked_fill(part.isinf(), 0.0) for part in (ours, right))
            assert float((ours - right).norm()) <= 1e-5 * max(1.0, float(right.norm()))


def test_views_of_many_are_no_contiguous_rows() -> None:
    x, y = torch.randn(20, 3, 8), torch.randn(8, 20)
    straight = {"x": x[:, 1].contiguous(), "y": y.T.contiguous(), "scale": torch.tensor(1.0)}
    for ours, right in zip(
        product_logsumexp(x[:, 1].to(DEVICE), y.T.to(DEVICE), torch.tensor(1.0, device=DEVICE), path="triton"),
        results("tiled", straight),
        strict=False,
    ):
        assert torch.allclose(ours, right, rtol=1e-5, atol=1e-5)


def test_what_leaves_the_range_goes_the_safe_way() -> None:
    sides = {"x": 30 * torch.randn(20, 8), "y": 30 * torch.randn(20, 8), "scale": torch.tensor(1.0)}
    for ours, right in zip(results("triton", sides), results("tiled", sides), strict=True):
        assert torch.equal(ours, right) and bool(ours.isfinite().all())


def test_two_runs_are_equal_to_the_bit() -> None:
    sides = {"x": torch.randn(40, 8), "y": torch.randn(50, 8), "scale": torch.tensor(1.0)}
    for first, second in zip(results("triton", sides), results("triton", sides), strict=True):
        assert torch.equal(first, second)


def test_only_on_demand_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert choose_path(8192, 8192, torch.bfloat16, device=gpu).name == "cached"
    monkeypatch.setenv("MMREP_TRITON", "1")
    assert choose_path(8192, 8192, torch.bfloat16, device=gpu).name == "triton"
    assert choose_path(8192, 8192, torch.bfloat16, device=cpu).name == "cached"
    assert choose_path(2048, 2048, torch.bfloat16, device=gpu).name == "cached"
    assert choose_path(8192, 8192, torch.float64, device=gpu).name == "tiled"


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
def test_bf16_on_a_gpu() -> None:
    sides = {name: torch.nn.functional.normalize(torch.randn(3000, 256), dim=1).bfloat16() for name in "xy"}
    sides["scale"] = torch.tensor(20.0)
    for ours, right in zip(results("triton", sides), results("tiled", sides), strict=True):
        assert float((ours - right).float().norm()) <= 5e-3 * float(right.float().norm())
