"""The kernels of one direction, whose gradient is made in the forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.ops import row_cross_entropy as row_module
from mmrep.ops import tiles
from mmrep.ops.row_cross_entropy import _strips, row_cross_entropy
from mmrep.ops.sigmoid_cross_entropy import _tiles, sigmoid_cross_entropy

KERNELS = ("row", "sigmoid")


def arguments(kernel: str, n: int, columns: int, dtype: torch.dtype = torch.float64, d: int = 3) -> list[Tensor]:
    x, y = (F.normalize(torch.randn(count, d, dtype=dtype), dim=1).requires_grad_() for count in (n, columns))
    scale = torch.tensor(5.0, dtype=dtype, requires_grad=True)
    if kernel == "row":
        return [x, y, torch.randn(n, dtype=dtype, requires_grad=True), scale]
    return [x, y, scale, torch.tensor(-2.0, dtype=dtype, requires_grad=True)]


def call(kernel: str, *values: Tensor, offset: int = 0, path: str | None = None) -> Tensor:
    """A kernel whose positives stand on a diagonal."""
    if kernel == "row":
        return row_cross_entropy(*values, torch.arange(offset, offset + len(values[0])), path=path)
    return sigmoid_cross_entropy(*values, offset=offset, path=path)


def literal(kernel: str, offset: int, x: Tensor, y: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
    """Entry by entry."""
    total = x.new_zeros(())
    for i, row in enumerate(x):
        if kernel == "row":
            logits = [third[i] if j == offset + i else fourth * (row @ y[j]) for j in range(len(y))]
            total = total + torch.stack(logits).logsumexp(dim=0) - third[i]
        else:
            for j in range(len(y)):
                sign = 1 if j == offset + i else -1
                total = total - F.logsigmoid(sign * (third * (row @ y[j]) + fourth))
    return total


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", 3)
    monkeypatch.setattr(row_module, "CPU_STRIP", 12)
    monkeypatch.setattr(row_module, "LEAST_HEIGHT", 2)


@pytest.mark.parametrize("path", ["dense", "tiled"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("offset", [0, 2])
def test_equals_its_definition_twice_differentiable(kernel: str, path: str, offset: int) -> None:
    values = arguments(kernel, 5, 8)

    def run(*inputs: Tensor) -> Tensor:
        return call(kernel, *inputs, offset=offset, path=path)

    found, wanted = run(*values), literal(kernel, offset, *values)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
    for ours, right in zip(
        torch.autograd.grad(3 * found, values), torch.autograd.grad(3 * wanted, values), strict=True
    ):
        assert torch.allclose(ours, right, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(run, values) and torch.autograd.gradgradcheck(run, values)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_equal_the_plain_formula_in_fp32_arithmetic(kernel: str, dtype: torch.dtype) -> None:
    values = arguments(kernel, 50, 70, dtype, d=16)
    results = [call(kernel, *values, offset=7, path=path) for path in ("dense", "tiled")]
    assert results[1].dtype == torch.float32
    assert float(results[1].detach()) == pytest.approx(float(results[0].detach()), rel=2e-6)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for ours, right in zip(*(torch.autograd.grad(result, values) for result in results), strict=True):
        assert ours.dtype == dtype
        assert float((ours - right).float().norm()) <= tolerance * max(1.0, float(right.float().norm()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_gradients_none_are_made(kernel: str) -> None:
    values = arguments(kernel, 5, 8)
    quiet_values = [value.detach() for value in values]
    parts = _strips(*quiet_values, torch.arange(5), False) if kernel == "row" else _tiles(*quiet_values, 0, False)
    assert all(part.numel() == 0 for part in parts[1:])
    with torch.no_grad():
        quiet = call(kernel, *values, path="tiled")
    assert not quiet.requires_grad and torch.equal(quiet, call(kernel, *values, path="tiled").detach())


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_row_at_all_is_zero(kernel: str) -> None:
    for path in ("dense", "tiled"):
        values = arguments(kernel, 0, 8)
        loss = call(kernel, *values, offset=3, path=path)
        loss.backward()
        assert float(loss.detach()) == 0.0 and all(v.grad is not None and not v.grad.any() for v in values)


@pytest.mark.parametrize("kernel", KERNELS)
def test_large_logits_stay_finite(kernel: str) -> None:
    x, y, third, fourth = (1e3 * value.detach() for value in arguments(kernel, 5, 8, torch.float32))
    for path in ("dense", "tiled"):
        assert bool(call(kernel, x, y, third, fourth, path=path).isfinite())


@pytest.mark.parametrize("path", ["dense", "tiled"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_inputs_may_depend_on_each_other(kernel: str, path: str) -> None:
    """Also where gradients are differentiated again: each input has its own share of the gradient, once."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        third = x.sum(dim=1) if kernel == "row" else x.sum().cos()
        return call(kernel, x, x, third, x.sum().sin(), path=path)

    assert torch.autograd.gradcheck(run, (x,)) and torch.autograd.gradgradcheck(run, (x,))
    (plain,), (again,) = (torch.autograd.grad(run(x), (x,), create_graph=graph) for graph in (False, True))
    assert torch.allclose(plain, again, rtol=1e-12)


@pytest.mark.parametrize("path", ["dense", "tiled"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_changes_nothing(kernel: str, path: str) -> None:
    values = [value.detach() for value in arguments(kernel, 5, 8, torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(kernel, *values, path=path)
    assert torch.equal(found, call(kernel, *values, path=path))


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_and_keeps_pytorchs_rules(kernel: str) -> None:
    values = arguments(kernel, 5, 8, torch.float32)
    compiled = torch.compile(lambda *v: call(kernel, *v, path="tiled"), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*values), call(kernel, *values, path="dense")
    for ours, right in zip(torch.autograd.grad(found, values), torch.autograd.grad(wanted, values), strict=True):
        assert torch.allclose(ours, right, rtol=1e-5, atol=1e-6)
    if kernel == "row":
        torch.library.opcheck(_strips, (*values, torch.arange(5), True))
        torch.library.opcheck(_strips, (*(value.detach().bfloat16() for value in values), torch.arange(5), False))
    else:
        torch.library.opcheck(_tiles, (*values, 0, True))
        torch.library.opcheck(_tiles, (*(value.detach().bfloat16() for value in values), 0, False))


def test_paths_are_checked() -> None:
    with pytest.raises(Exception, match="path='tile'; did you mean 'tiled'"):
        call("row", *arguments("row", 2, 2), path="tile")


@pytest.mark.parametrize("path", ["dense", "tiled"])
def test_positives_may_stand_anywhere(path: str) -> None:
    x, y, positives, scale = arguments("row", 5, 8)
    order = torch.tensor([6, 1, 0, 7, 3])
    found = row_cross_entropy(x, y, positives, scale, order, path=path)
    columns = torch.cat([y[order], y[[2, 4, 5]]])  # now the positives are on the diagonal
    wanted = literal("row", 0, x, columns, positives, scale)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)
