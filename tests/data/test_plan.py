"""The plan: each sample once, the same global batches for any number of ranks, equal counts everywhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.data.plan import PADDING, Plan, PlanSampler
from mmrep.errors import ConfigError, DataError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_each_sample_once_up_to_the_remainder(n: int, world: int, share: int, seed: int) -> None:
    batch = world * share
    if n >= batch:
        plan = Plan(n, batch, seed, train=True)
        seen = np.concatenate([plan.batches(3, rank, world).ravel() for rank in range(world)])
        assert len(seen) == len(set(seen.tolist())) == n // batch * batch
    plan = Plan(n, batch, seed, train=False)
    seen = np.concatenate([plan.batches(3, rank, world).ravel() for rank in range(world)])
    assert sorted(seen[seen != PADDING].tolist()) == list(range(n))
    assert len({plan.batches(0, rank, world).shape for rank in range(world)}) == 1


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    plan = Plan(100, 12, 5, train=True)
    whole = plan.batches(2)
    for world in (2, 3, 4, 6):
        assert np.array_equal(np.concatenate([plan.batches(2, rank, world) for rank in range(world)], axis=1), whole)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    plan = Plan(100, 10, 5, train=True)
    assert np.array_equal(plan.batches(1), plan.batches(1))
    assert not np.array_equal(plan.batches(1), plan.batches(2))
    assert not np.array_equal(plan.batches(1), Plan(100, 10, 6, train=True).batches(1))
    assert np.array_equal(Plan(10, 4, 5, train=False).batches(1), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]])


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(DataError, match="fewer than one global batch"):
        Plan(9, 10, 0, train=True)
    with pytest.raises(ConfigError, match="cannot be shared by 3 ranks"):
        PlanSampler(Plan(40, 10, 0, train=True), world=3)
    with pytest.raises(ConfigError, match="global batch of 0"):
        Plan(9, 0, 0, train=True)


def test_sampler_asks_for_the_epoch_at_each_pass() -> None:
    epoch = [0]
    plan = Plan(20, 5, 0, train=True)
    sampler = PlanSampler(plan, lambda: epoch[0])
    first = list(sampler)
    epoch[0] = 4
    second = list(sampler)
    assert len(sampler) == 4 and second[0][0][0] == 4
    assert [[n for _, n in batch] for batch in first] == plan.batches(0).tolist()
