"""The kernel of InfoNCE and Symile: every path, ragged tiles, weights, range, memory, compilation."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmrep.ops import tile_pass, tiles
from mmrep.ops.paths import choose_path
from mmrep.ops.product_logsumexp import _forward, product_logsumexp

PATHS = ("dense", "cached", "tiled")
SAFE = {"fast": 1e-30, "safe": math.inf}
"""Least sums: with the second, none is large enough, and every tile gets its own maximum."""


def inputs(n: int, rests: int, columns: int, d: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """x, y, scale, and rest where there are any."""
    sides = {"x": n, "y": columns, **({"rest": rests} if rests else {})}
    found: dict[str, Any] = {
        name: torch.randn(count, d, dtype=dtype, requires_grad=True) for name, count in sides.items()
    }
    return {**found, "scale": torch.tensor(1.5, dtype=dtype, requires_grad=True)}


def options(n: int, rests: int, columns: int, weighted: bool) -> dict[str, Any]:
    """Positives somewhere off the corner, and weights with zeros."""
    where = {"offset": 1, "rest_stride": 1 if rests > n else 0, "stride": 1}
    if not weighted:
        return where
    rows = (torch.arange(n * max(1, rests)) % 3).double()
    return {**where, "row_weights": rows, "column_weights": (torch.arange(columns) % 2).double()}


def literal(x: Tensor, y: Tensor, scale: Tensor, rest: Tensor | None = None, **how: Any) -> tuple[Tensor, ...]:
    """The definition, entry by entry."""
    rests = [None] if rest is None else list(rest)
    combinations = [row if other is None else row * other for row, other in itertools.product(x, rests)]
    logits = scale * torch.stack(combinations) @ y.T
    stride = how.get("rest_stride", 1) if rest is not None else 0
    places = [
        (i * len(rests) + (i + how["offset"]) * stride, (i + how["offset"]) * how["stride"]) for i in range(len(x))
    ]
    positives = torch.stack([logits[place] for place in places])
    exponentials = logits.exp()
    if how.get("without_positives"):
        keep = torch.ones_like(logits)
        for place in places:
            keep[place] = 0
        exponentials = exponentials * keep
    rows = exponentials if how.get("column_weights") is None else exponentials * how["column_weights"]
    columns = exponentials if how.get("row_weights") is None else exponentials * how["row_weights"][:, None]
    return rows.sum(dim=1).log(), columns.sum(dim=0).log(), positives


@pytest.mark.parametrize("mode", SAFE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tile", [1, 2, 3, 5, 1024])
@pytest.mark.parametrize("rests", [0, 3, 6])
def test_equals_its_definition(rests: int, tile: int, path: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    monkeypatch.setattr(tile_pass, "LEAST_SUM", SAFE[mode])
    for weighted, without in itertools.product((False, True), repeat=2):
        given_, how = inputs(4, rests, 7), {**options(4, rests, 7, weighted), "without_positives": without}
        found, wanted = product_logsumexp(**given_, **how, path=path), literal(**given_, **how)
        mix = [torch.randn_like(part) for part in wanted]
        gradients = []
        for parts in (found, wanted):
            total = torch.stack([(part * weight).sum() for part, weight in zip(parts, mix, strict=True)]).sum()
            gradients.append(torch.autograd.grad(total, list(given_.values())))
        for ours, theirs in zip([*found, *gradients[0]], [*wanted, *gradients[1]], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", SAFE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rests", [0, 3])
def test_gradcheck_twice(rests: int, path: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", 2)
    monkeypatch.setattr(tile_pass, "LEAST_SUM", SAFE[mode])
    for weighted, without in itertools.product((False, True), repeat=2):
        given_ = inputs(3, rests, 5, d=2)
        how = {**options(3, rests, 5, weighted), "without_positives": without, "path": path}

        def run(*values: Tensor, names: Any = tuple(given_), how: Any = how) -> tuple[Tensor, ...]:
            return product_logsumexp(**dict(zip(names, values, strict=True)), **how)

        assert torch.autograd.gradcheck(run, tuple(given_.values()))
        assert torch.autograd.gradgradcheck(run, tuple(given_.values()))


@pytest.mark.parametrize("path", PATHS)
def test_inputs_may_depend_on_each_other_also_where_gradients_are_differentiated_again(path: str) -> None:
    """One is computed from another, or is the same: each has its own share of the gradient, once."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        same = product_logsumexp(x, x, scale, path=path)
        other = product_logsumexp(x, torch.tanh(2 * x), scale * x.sum().cos(), rest=x * x, path=path)
        return torch.stack([part.sin().sum() for part in (*same, *other)]).sum()

    assert torch.autograd.gradcheck(run, (x, scale)) and torch.autograd.gradgradcheck(run, (x, scale))
    plain = torch.autograd.grad(run(x, scale), (x, scale))
    again = torch.autograd.grad(run(x, scale), (x, scale), create_graph=True)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_autocast_changes_nothing(path: str) -> None:
    x, y = torch.randn(30, 8), torch.randn(30, 8)
    expected = product_logsumexp(x, y, torch.tensor(20.0), path=path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = product_logsumexp(x, y, torch.tensor(20.0), path=path)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_symile_at_the_scale_it_starts_with_goes_the_fast_way() -> None:
    """Its products are far shorter than their factors: a bound by the lengths of these would leave the range of fp32."""
    x, y, z = (F.normalize(torch.randn(40, 512), dim=1) for _ in range(3))
    shift = _forward(x, y, z, torch.tensor(3.0 * 512), None, None, [0, 1, 1], False, False, False)[4]
    assert 0 < float(shift) < 100


@pytest.mark.parametrize("path", PATHS)
def test_no_rows_and_absent_ones_give_minus_infinity_without_a_gradient(path: str) -> None:
    y = torch.randn(5, 3, requires_grad=True)
    empty = torch.zeros(0, 3, requires_grad=True)
    rows, columns, positives = product_logsumexp(empty, y, torch.tensor(2.0), path=path)
    assert rows.shape == (0,) and positives.shape == (0,) and bool((columns == -torch.inf).all())
    columns.masked_fill(columns.isinf(), 0.0).sum().backward()
    assert y.grad is not None and not y.grad.any()
    x = torch.randn(2, 3, requires_grad=True)
    rows, columns, _ = product_logsumexp(
        x, y, torch.tensor(2.0), row_weights=torch.zeros(2), column_weights=torch.zeros(5), path=path
    )
    assert bool(rows.isinf().all() and columns.isinf().all())
    (rows.sum() + columns.sum()).backward()  # a gradient into -inf reaches nothing
    assert x.grad is not None and not x.grad.any() and not x.grad.isnan().any()


BATCHES = {
    "saturated": lambda: (F.normalize(torch.randn(40, 8), dim=1),) * 2,
    "constant": lambda: (torch.ones(40, 8) / 8**0.5,) * 2,
    "zero": lambda: (torch.zeros(40, 8),) * 2,
    "opposed": lambda: (torch.ones(40, 8) / 8**0.5, -torch.ones(40, 8) / 8**0.5),
    "huge": lambda: (30 * torch.randn(40, 8), 30 * torch.randn(40, 8)),
    "norms of 1.3": lambda: tuple(1.3 * F.normalize(torch.randn(40, 8), dim=1) for _ in range(2)),
    "one huge row": lambda: (torch.cat([1e3 * torch.ones(1, 8), torch.randn(39, 8)]), torch.randn(40, 8)),
}


@pytest.mark.parametrize("path", ["cached", "tiled"])
@pytest.mark.parametrize("batch", BATCHES)
def test_extreme_batches_in_fp32(batch: str, path: str) -> None:
    """At scale 100: no overflow, no underflow, no NaN, and the loss of one that knows all digits."""
    x, y = (side.clone().requires_grad_() for side in BATCHES[batch]())
    scale = torch.tensor(100.0)
    rows, columns, positives = product_logsumexp(x, y, scale, path=path)
    loss = ((rows - positives) + (columns - positives)).mean() / 2
    wide = [side.detach().double().requires_grad_() for side in (x, y)]
    logits = scale.double() * wide[0] @ wide[1].T
    exact = (F.cross_entropy(logits, torch.arange(40)) + F.cross_entropy(logits.T, torch.arange(40))) / 2
    largest = float(logits.detach().abs().max())
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-5, abs=1e-6 * max(1.0, largest / 100))
    assert float(loss.detach()) > -1e-6 * max(1.0, largest / 100)
    for ours, theirs in zip(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(exact, wide), strict=True):
        assert float((ours - theirs).norm()) <= 1e-4 * max(float(theirs.norm()), 1.0)


def shift_of(x: Tensor, y: Tensor, scale: float) -> float:
    return float(_forward(x, None, y, torch.tensor(scale), None, None, [0, 0, 1], False, False, False)[4])


def test_the_fast_way_is_left_only_where_its_range_ends() -> None:
    """Both failures, a sum that underflows and one that overflows, are seen in the sums."""
    unit = F.normalize(torch.randn(40, 8), dim=1)
    assert shift_of(unit, unit, 14.3) == 0.0 and shift_of(unit, unit, 100.0) == pytest.approx(40.0, abs=1e-3)
    assert math.isnan(shift_of(unit, -unit[:1].expand(40, -1), 500.0))  # no positive is near the bound
    assert math.isnan(shift_of(30 * unit, 30 * torch.randn(40, 8), 1.0))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 3), st.sampled_from([1.0, 14.3, 100.0]), st.integers(0, 99))
def test_fast_and_safe_agree(n: int, more: int, offset: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(k, 5, generator=generator), dim=1) for k in (n, n + more + offset))
    fast = product_logsumexp(x, y, torch.tensor(scale), offset=offset, path="tiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_pass, "LEAST_SUM", math.inf)
        safe = product_logsumexp(x, y, torch.tensor(scale), offset=offset, path="tiled")
    for a, b in zip(fast, safe, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_half_precision_is_exact_but_for_its_rows(path: str, dtype: torch.dtype) -> None:
    """Logits of bf16, as autocast of a product gives them, are off by a percent here."""
    x, y = (F.normalize(torch.randn(300, 64), dim=1).to(dtype).requires_grad_() for _ in range(2))
    scale, labels = torch.tensor(100.0), torch.arange(300)
    rows, columns, positives = product_logsumexp(x, y, scale, path=path)
    loss = (rows + columns - 2 * positives).mean() / 2
    wide = [side.detach().double().requires_grad_() for side in (x, y)]
    logits = scale.double() * wide[0] @ wide[1].T
    exact = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    theirs = torch.autograd.grad(exact, wide)
    for ours, right in zip(torch.autograd.grad(loss, (x, y)), theirs, strict=True):
        assert ours.dtype == dtype and float((ours - right).norm() / right.norm()) < 3e-3
    if dtype == torch.float16:
        return
    rounded = scale.to(dtype) * x @ y.T
    narrow = (F.cross_entropy(rounded, labels) + F.cross_entropy(rounded.T, labels)) / 2
    error = (torch.autograd.grad(narrow, (x, y))[0] - theirs[0]).norm() / theirs[0].norm()
    assert float(error) > 3e-3


@pytest.mark.parametrize("path", ["cached", "tiled"])
def test_two_runs_are_equal_to_the_bit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", 64)
    x, y = (F.normalize(torch.randn(200, 16), dim=1).requires_grad_() for _ in range(2))
    runs = []
    for _ in range(2):
        rows, columns, positives = product_logsumexp(x, y, torch.tensor(20.0), path=path)
        runs.append([rows, columns, *torch.autograd.grad((rows + columns - positives).sum(), (x, y))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rests", [0, 6])
def test_compiles_into_one_graph(path: str, rests: int) -> None:
    given_, names = inputs(4, rests, 7, dtype=torch.float32), ("x", "y", "scale", "rest")

    def run(*values: Tensor) -> Tensor:
        parts = product_logsumexp(**dict(zip(names, values, strict=False)), offset=1, path=path)
        return torch.stack([part.sum() for part in parts]).sum()

    values = [given_[name] for name in names if name in given_]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(*values), values)
    for ours, right in zip(torch.autograd.grad(compiled(*values), values), expected, strict=True):
        assert torch.allclose(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rests", [0, 6])
def test_the_operation_keeps_pytorchs_rules(rests: int) -> None:
    """Schema, fake kernel, autograd registration."""
    given_ = inputs(4, rests, 7)
    arguments = (
        given_["x"],
        given_.get("rest"),
        given_["y"],
        given_["scale"],
        None,
        None,
        [0, 1, 1],
        False,
        True,
        False,
    )
    torch.library.opcheck(_forward, arguments)


def test_the_path_can_be_asked() -> None:
    assert choose_path(200, 200, torch.float32).name == "dense"
    assert choose_path(4096, 4096, torch.float32).name == "cached"
    asked = choose_path(16384, 16384, torch.float32)
    assert asked.name == "tiled" and asked.reason == "1024 MiB of logits are more than the 256 that may be kept"
    assert choose_path(4096, 4096, torch.float32, terms=10).name == "tiled"
    assert choose_path(4096, 4096, torch.float64).name == "dense"
    assert choose_path(16384, 16384, torch.float64).name == "tiled"


MEMORY = """
import sys
import torch
from benchmarks.measure import peak_growth
from mmrep.ops.product_logsumexp import product_logsumexp

torch.set_num_threads(1)

def step(n):
    x, y = (torch.randn(n, 128, requires_grad=True) for _ in range(2))
    scale = torch.tensor(0.1)
    def run():
        rows, columns, positives = product_logsumexp(x, y, scale, path="tiled")
        (rows + columns - positives).sum().backward()
    return run

print(peak_growth(step(300), step(int(sys.argv[1]))))
"""


@pytest.mark.slow
def test_memory_is_linear_in_the_batch() -> None:
    """In processes of their own: the growth of the peak of resident memory, from 4,096 to 16,384 rows."""
    command = [sys.executable, "-c", MEMORY]
    small, large = (
        int(subprocess.run([*command, n], check=True, capture_output=True, text=True).stdout) for n in ("4096", "16384")
    )
    assert large < 16384 * 16384 * 4 / 10  # nowhere near the logits
    assert math.log(large / small) / math.log(4) <= 1.15
