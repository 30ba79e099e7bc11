"""The gather: rows of all ranks, and gradients back to where they came from."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrep.ops.gather import (
    gather_embeddings,
    gather_rows,
    gather_stacked,
    logsumexp_over_ranks,
    row_counts,
    sum_over_ranks,
)
from tests.gloo_pool import GlooPool


def rows_of(rank: int, count: int) -> Tensor:
    return (torch.arange(count * 3, dtype=torch.float64).view(count, 3) + 100 * rank).requires_grad_()


def gathered(rank: int, count: int) -> tuple[Tensor, list[int]]:
    rows = rows_of(rank, count)
    return gather_rows(rows).detach(), row_counts(count, rows.device)


def test_rows_come_in_rank_order_also_when_uneven(pool3: GlooPool) -> None:
    counts = (2, 0, 3)
    expected = torch.cat([rows_of(rank, count) for rank, count in enumerate(counts)]).detach()
    for rows, seen in pool3.run(gathered, list(enumerate(counts))):
        assert torch.equal(rows, expected)
        assert seen == list(counts)


def strided_gradient(rank: int, count: int, weights: Tensor) -> Tensor:
    """Gradient of a loss whose gradient towards the gathered rows has transposed strides."""
    rows = rows_of(rank, count)
    everyone = gather_rows(rows)
    transposed = weights.T.contiguous().T  # the values of weights, columns first in memory
    everyone.backward(transposed * (rank + 1))
    assert rows.grad is not None
    return rows.grad


def test_a_strided_gradient_arrives_whole_and_summed_over_ranks(pool2: GlooPool) -> None:
    """gloo reads strided memory in the wrong order: torch.distributed.nn.functional.all_gather fails this test."""
    weights = torch.arange(15, dtype=torch.float64).view(5, 3)
    first, second = pool2.run(strided_gradient, [(0, 2, weights), (1, 3, weights)])
    assert torch.equal(first, 3 * weights[:2])
    assert torch.equal(second, 3 * weights[2:])


def presence_everywhere(rank: int) -> tuple[dict[str, Tensor], int, int]:
    rows = {"x": rows_of(rank, 2), "y": rows_of(rank, 2)}
    present = {"x": torch.tensor([rank == 0, True]), "y": torch.tensor([True, rank == 1])}
    gathered = gather_embeddings(rows, present)
    return gathered.present, gathered.offset, len(gathered.own["x"])


def test_presence_travels_with_the_rows(pool2: GlooPool) -> None:
    for rank, (present, offset, local) in enumerate(pool2.run(presence_everywhere, [(0,), (1,)])):
        assert present["x"].tolist() == [True, True, False, True]
        assert present["y"].tolist() == [True, False, True, True]
        assert (offset, local) == (2 * rank, 2)


def test_one_process_gathers_nothing() -> None:
    rows = rows_of(0, 2)
    assert gather_rows(rows) is rows
    assert torch.equal(gather_stacked(rows), rows.detach()[None]) and torch.equal(sum_over_ranks(rows), rows.detach())


def statistics(rank: int) -> tuple[Tensor, Tensor]:
    tensor = rows_of(rank, 2).T  # strided
    return gather_stacked(tensor), sum_over_ranks(tensor)


def test_statistics_of_all_ranks(pool3: GlooPool) -> None:
    expected = torch.stack([rows_of(rank, 2).detach().T for rank in range(3)])
    for stacked, total in pool3.run(statistics, [(rank,) for rank in range(3)]):
        assert torch.equal(stacked, expected) and torch.equal(total, expected.sum(dim=0))
        assert not stacked.requires_grad and not total.requires_grad


def selected(rank: int, count: int) -> tuple[dict[str, Tensor], slice, int]:
    """Views of unequal number; y is there where its row number is odd."""
    first = {0: 0, 1: 3}[rank]
    rows = torch.arange(first, first + count, dtype=torch.float64)[:, None, None]
    embeddings = {"x": rows.expand(-1, 2, 4) + 0.5, "y": rows[:, 0].expand(-1, 4)}
    numbers = torch.arange(first, first + count)
    present = {"x": torch.ones(count, dtype=torch.bool), "y": numbers % 2 == 1}
    chosen = gather_embeddings(embeddings, present).select(["x", "y"])
    return chosen.rows, chosen.mine, chosen.total


def test_a_selection_knows_which_rows_are_this_ranks(pool2: GlooPool) -> None:
    for (rows, mine, total), expected in zip(
        pool2.run(selected, [(0, 3), (1, 4)]), [slice(0, 1), slice(1, 3)], strict=True
    ):
        assert rows["x"].shape == (3, 2, 4) and rows["x"][:, 0, 0].tolist() == [1.5, 3.5, 5.5]
        assert rows["y"].shape == (3, 4) and rows["y"][:, 0].tolist() == [1, 3, 5]
        assert (mine, total) == (expected, 3)


def stays_at_home(rank: int) -> tuple[list[str], dict[str, int], Tensor, Tensor]:
    """x does not travel; y comes in bf16 and has a NaN on rank 1."""
    x, y = rows_of(rank, 2 + rank).float(), rows_of(rank, 2 + rank).detach().to(torch.bfloat16).requires_grad_()
    poisoned = torch.where(torch.tensor(rank == 1), torch.nan, x)
    gathered = gather_embeddings({"x": poisoned, "y": y}, travelling=["y"])
    gathered.rows["y"].sum().backward()
    assert y.grad is not None
    return list(gathered.rows), gathered.not_finite, gathered.rows["y"].detach(), y.grad


def test_what_need_not_travel_stays_and_half_precision_is_widened_on_arrival(pool2: GlooPool) -> None:
    expected = torch.cat([rows_of(rank, 2 + rank) for rank in range(2)]).detach().to(torch.bfloat16).float()
    for names, not_finite, rows, gradient in pool2.run(stays_at_home, [(0,), (1,)]):
        assert names == ["y"] and not_finite == {"x": 3, "y": 0}
        assert rows.dtype == torch.float32 and torch.equal(rows, expected)
        assert gradient.dtype == torch.bfloat16 and bool((gradient == 2).all())  # from both ranks


def sums_over_ranks(rank: int, own: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    own = own.clone().requires_grad_()
    first, second = logsumexp_over_ranks([own[:2], own[2:]])
    both = torch.cat([first, second])
    both.backward((weights * (rank + 1)).expand(2, -1).T[:, 0])  # strided
    assert own.grad is not None
    return both.detach(), own.grad


def test_log_sum_exps_are_added_up_over_ranks_with_gradients_from_all(pool3: GlooPool) -> None:
    """One rank has nothing to add to a column, and none has anything to add to the last."""
    own = torch.randn(3, 5, dtype=torch.float64)
    own[1, 3], own[:, 4] = -torch.inf, -torch.inf
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    everyone = own.exp().sum(dim=0).log()
    share = torch.where(own.isfinite(), (own - everyone).exp(), 0.0)
    for rank, (total, gradient) in enumerate(pool3.run(sums_over_ranks, [(r, own[r], weights) for r in range(3)])):
        assert torch.allclose(total, everyone) and torch.allclose(gradient, 6 * weights * share[rank])


def test_one_process_adds_nothing_up() -> None:
    columns = [torch.randn(3), torch.randn(2)]
    assert all(a is b for a, b in zip(logsumexp_over_ranks(columns), columns, strict=True))


def test_a_complete_selection_copies_nothing() -> None:
    rows = {"x": torch.randn(4, 3), "y": torch.randn(4, 3)}
    chosen = gather_embeddings(rows, {"x": torch.ones(4, dtype=torch.bool), "y": torch.arange(4) > 0}).select(["x"])
    assert chosen.own["x"] is rows["x"] and chosen.rows["x"] is rows["x"] and chosen.mine == slice(0, 4)
