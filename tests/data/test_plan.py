"""The plan: each sample once, the same global batches on any number of ranks, exact shares, any batch without those before."""

from __future__ import annotations

import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrep.data.apportion import apportion, interleave, whole_weights
from mmrep.data.order import Contents, Order, permutation
from mmrep.data.plan import PADDING, Plan, PlanSampler
from mmrep.errors import ConfigError, DataError


class Stored:
    """Modality sets as an index would give them; a class, so that it can be pickled."""

    def __init__(self, sets: list[np.ndarray]) -> None:
        self.sets = sets

    def __call__(self, shard: int) -> np.ndarray:
        return self.sets[shard]


def with_sets(seed: int, sizes: list[int], kinds: int) -> Contents:
    rng = np.random.default_rng(seed)
    sets = [rng.integers(1, kinds + 1, size) for size in sizes]
    counts = np.array([[int((found == kind).sum()) for kind in range(1, kinds + 1)] for found in sets])
    return Contents(counts, tuple(range(1, kinds + 1)), Stored(sets))


def one(n: int, batch: int, seed: int = 0, *, train: bool = True) -> Plan:
    """A dataset of ``n`` samples in shards of seven."""
    return Plan([Contents.uniform([7] * (n // 7) + [n % 7])], batch, seed, train)


def epoch(plan: Plan, number: int, rank: int = 0, world: int = 1) -> np.ndarray:
    return np.array([batch.samples for batch in plan.batches(number, 0, rank, world)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_each_sample_once_up_to_the_remainder(n: int, world: int, share: int, seed: int) -> None:
    batch = world * share
    if n >= batch:
        seen = np.concatenate([epoch(one(n, batch, seed), 3, rank, world).ravel() for rank in range(world)])
        assert len(seen) == len(set(seen.tolist())) == n // batch * batch
    plan = one(n, batch, seed, train=False)
    seen = np.concatenate([epoch(plan, 3, rank, world).ravel() for rank in range(world)])
    assert sorted(seen[seen != PADDING].tolist()) == list(range(n))
    assert len({epoch(plan, 0, rank, world).shape for rank in range(world)}) == 1


@pytest.mark.parametrize("batching", ["mixed", "stratified", "homogeneous"])
def test_skewed_and_empty_shards_give_equal_batches_and_each_sample_once(batching: str) -> None:
    contents = with_sets(1, [1000, 3, 0, 40], 3)
    plan = Plan([contents], 16, 0, True, batching=batching, window=2)
    ranks = [epoch(plan, 1, rank, 4) for rank in range(4)]
    assert {found.shape for found in ranks} == {(plan.num_batches, 4)}
    seen = np.concatenate([found.ravel() for found in ranks])
    assert len(seen) == len(set(seen.tolist()))
    lost = len(contents) - len(seen)
    assert lost < (3 * 16 if batching == "homogeneous" else 16)


def test_one_shard_feeds_four_ranks() -> None:
    plan = Plan([Contents.uniform([50])], 12, 0, True)
    assert [epoch(plan, 0, rank, 4).shape for rank in range(4)] == [(4, 3)] * 4


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    plan = one(100, 12, 5)
    whole = epoch(plan, 2)
    for world in (2, 3, 4, 6):
        assert np.array_equal(np.concatenate([epoch(plan, 2, rank, world) for rank in range(world)], axis=1), whole)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 4),
    st.sampled_from(["mixed", "stratified", "homogeneous"]),
    st.booleans(),
)
def test_any_batch_without_those_before_it(
    sizes: list[int], batch: int, number: int, window: int, batching: str, blended: bool
) -> None:
    contents = [with_sets(0, sizes, 2), with_sets(1, sizes[::-1], 3)][: 1 + blended]
    try:
        plan = Plan(contents, batch, 7, True, [1.0, 2.5][: len(contents)], batching, window)
    except DataError:
        return
    whole = list(plan.batches(number))
    assert len(whole) == plan.num_batches
    for start in range(plan.num_batches):
        fresh = pickle.loads(pickle.dumps(plan))  # nothing remembered
        later = next(fresh.batches(number, start))
        assert np.array_equal(later.samples, whole[start].samples) and np.array_equal(later.parts, whole[start].parts)
        assert np.array_equal(later.cycles, whole[start].cycles)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    plan = one(100, 10, 5)
    assert np.array_equal(epoch(plan, 1), epoch(plan, 1))
    assert not np.array_equal(epoch(plan, 1), epoch(plan, 2))
    assert not np.array_equal(epoch(plan, 1), epoch(one(100, 10, 6), 1))
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, PADDING, PADDING]]
    assert np.array_equal(epoch(one(10, 4, 5, train=False), 1), expected)


def test_the_order_is_fixed_for_good() -> None:
    """Numbers written down once: another version of NumPy, or of mmrep, must give them too, or raise PLAN_VERSION."""
    assert permutation(8, 0, "a").tolist() == GOLDEN_PERMUTATION
    plan = Plan([Contents.uniform([5, 5, 5])], 5, 3, True, window=2)
    assert epoch(plan, 1).tolist() == GOLDEN_EPOCH


GOLDEN_PERMUTATION = [0, 1, 2, 7, 3, 6, 4, 5]
GOLDEN_EPOCH = [[7, 6, 1, 3, 0], [8, 4, 2, 5, 9], [14, 13, 11, 12, 10]]


def test_every_rank_meets_every_shard_and_windows_mix_shards() -> None:
    contents = Contents.uniform([40] * 8)
    plan = Plan([contents], 16, 0, True, window=4)
    for rank in range(4):
        met = {contents.shard_of(int(n)) for e in range(4) for n in epoch(plan, e, rank, 4).ravel()}
        assert met == set(range(8))
    first = epoch(plan, 0).ravel()[: 4 * 40]
    assert len({contents.shard_of(int(number)) for number in first}) == 4  # a window, and nothing of the next one
    assert len({contents.shard_of(int(number)) for number in epoch(plan, 0)[0]}) > 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 300))
def test_apportionment_never_falls_and_is_exact_where_it_can_be(weights: list[int], slots: int) -> None:
    before, after = apportion(slots, weights), apportion(slots + 1, weights)
    assert sum(before) == slots and sum(after) == slots + 1
    assert all(a >= b for a, b in zip(after, before, strict=True))
    shares = [Fraction(slots * weight, sum(weights)) for weight in weights]
    if all(share.denominator == 1 for share in shares):
        assert before == shares
    streams = interleave(apportion(0, weights), before, weights)
    assert np.bincount(streams, minlength=len(weights)).tolist() == before


def test_weights_become_whole_numbers() -> None:
    assert (
        whole_weights([0.3, 0.7]) == [3, 7]
        and whole_weights([2, 4]) == [1, 2]
        and whole_weights([1e-3, 1]) == [1, 1000]
    )


def test_a_blend_has_its_exact_share_in_every_global_batch_and_in_every_rank_about() -> None:
    plan = Plan([Contents.uniform([90, 30]), Contents.uniform([25])], 16, 0, True, [3, 1])
    cycles = set()
    for number in range(6):
        for batch in plan.batches(number):
            assert np.bincount(batch.parts, minlength=2).tolist() == [12, 4]
            assert (np.bincount(batch.parts[:4], minlength=2) == [3, 1]).all()
            small = batch.parts == 1
            cycles |= set(batch.cycles[small].tolist())
    assert cycles >= {0, 1, 2}
    of_small = [
        (int(c), int(s))
        for number in range(6)
        for batch in plan.batches(number)
        for p, c, s in zip(batch.parts, batch.cycles, batch.samples, strict=True)
        if p == 1
    ]
    assert len(of_small) == len(set(of_small))  # each sample once in each pass
    whole = [{s for c, s in of_small if c == cycle} for cycle in (0, 1)]
    assert all(len(found) == 24 and found < set(range(25)) for found in whole)  # six batches, and one sample is left
    assert [s for c, s in of_small if c == 0] != [s for c, s in of_small if c == 1]


@pytest.mark.parametrize("batching", ["mixed", "stratified"])
@pytest.mark.parametrize(
    ("sizes", "weights"), [((2000, 300), [1, 1]), ((2000, 130), [1, 1]), ((97, 501, 40), [3, 2, 0.7])]
)
def test_no_batch_of_a_blend_has_a_sample_twice(sizes: tuple[int, ...], weights: list[float], batching: str) -> None:
    """A pass ends where less than a share of a batch is left of it, which waits for another pass."""
    contents = [with_sets(number, [size // 2, size - size // 2], 2) for number, size in enumerate(sizes)]
    plan, share = Plan(contents, 64, 0, True, weights, batching), [64 * w / sum(weights) for w in weights]
    passes: dict[tuple[int, int], list[int]] = {}
    for number in range(4):
        for batch in plan.batches(number):
            slots = list(zip(batch.parts.tolist(), batch.samples.tolist(), strict=True))
            assert len(set(slots)) == len(slots) == 64
            for (part, sample), cycle in zip(slots, batch.cycles.tolist(), strict=True):
                passes.setdefault((part, cycle), []).append(sample)
    for (part, cycle), seen in passes.items():
        assert len(set(seen)) == len(seen)
        if (part, cycle + 1) in passes:
            assert len(contents[part]) - len(seen) <= share[part] + 1


def test_stratified_batches_have_their_share_of_each_modality_set() -> None:
    sets = [np.array([1] * 60 + [2] * 30 + [3] * 10)] * 4  # sorted, as an unlucky exporter leaves them
    contents = Contents(np.array([[60, 30, 10]] * 4), (1, 2, 3), Stored(sets))
    plan = Plan([contents], 20, 0, True, batching="stratified", window=1)
    for batch in plan.batches(0):
        assert np.bincount(contents.sets_at(batch.samples), minlength=4)[1:].tolist() == [12, 6, 2]
    mixed = Plan([contents], 20, 0, True, window=1)
    shares = [np.bincount(contents.sets_at(batch.samples), minlength=4)[1:].tolist() for batch in mixed.batches(0)]
    assert any(share != [12, 6, 2] for share in shares)


def test_homogeneous_batches_are_of_one_modality_set() -> None:
    contents = with_sets(0, [50, 70, 9], 3)
    other = with_sets(1, [64], 2)
    for parts in ([contents], [contents, other]):
        plan = Plan(parts, 8, 0, True, [1.0] * len(parts), batching="homogeneous")
        met = set()
        for number in range(2):
            for batch in plan.batches(number):
                (part,) = set(batch.parts.tolist())
                (kind,) = set(parts[part].sets_at(batch.samples).tolist())
                met.add((part, kind))
        assert len(met) == (3 if len(parts) == 1 else 5)


@pytest.mark.parametrize("batching", ["mixed", "stratified", "homogeneous"])
def test_spares_are_of_the_same_set_outside_the_batch_and_differ_between_slots(batching: str) -> None:
    contents = with_sets(3, [60, 60, 60], 2)
    plan = Plan([contents], 12, 0, True, batching=batching, window=2)
    (batch,) = itertools.islice(plan.batches(1, 2), 1)
    taken = []
    for slot in range(12):
        spares = list(plan.spares(1, 2, slot))
        assert len(spares) == len(set(spares)) > 10 and not set(spares) & set(batch.samples.tolist())
        assert set(contents.sets_at(np.array(spares)).tolist()) == {int(contents.sets_at(batch.samples)[slot])}
        taken.append(spares[0])
        assert list(plan.spares(1, 2, slot)) == spares
    assert len(set(taken)) >= (12 if batching != "mixed" else 8)


def test_upcoming_shards_are_the_window_and_the_next_one() -> None:
    contents = Contents.uniform([10] * 6)
    plan = Plan([contents], 10, 0, True, window=2)
    order = Order(contents, 0, 0, 2)._shards(0)[0].tolist()
    ahead = [shard for _, shard in plan.upcoming_shards(next(plan.batches(0)))]
    assert ahead == order[:4]
    last = next(plan.batches(0, 5))
    following = Order(contents, 0, 0, 2)._shards(1)[0].tolist()
    assert [shard for _, shard in plan.upcoming_shards(last)] == list(dict.fromkeys(order[4:] + following[:2]))


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(DataError, match="fewer than one global batch"):
        one(9, 10)
    with pytest.raises(DataError, match="of one modality set"):
        Plan([with_sets(0, [9], 3)], 8, 0, True, batching="homogeneous")
    with pytest.raises(ConfigError, match="cannot be shared by 3 ranks"):
        PlanSampler(one(40, 10), world=3)
    with pytest.raises(ConfigError, match="global batch of 0"):
        one(9, 0)
    with pytest.raises(ConfigError, match="did you mean 'stratified'"):
        Plan([Contents.uniform([9])], 2, 0, True, batching="stratifed")
    with pytest.raises(ConfigError, match="weights"):
        Plan([Contents.uniform([9])] * 2, 2, 0, True, [1, 0])
    with pytest.raises(DataError, match="dataset 2 of the blend has 3 samples"):
        Plan([Contents.uniform([99]), Contents.uniform([3])], 16, 0, True, [1, 1])


def test_sampler_asks_for_the_place_at_each_pass() -> None:
    place = [(0, 0)]
    plan = one(20, 5)
    sampler = PlanSampler(plan, lambda: place[0])
    assert [batch.samples.tolist() for batch in sampler] == epoch(plan, 0).tolist()
    place[0] = (4, 2)
    later = list(sampler)
    assert len(sampler) == 4 and [(batch.epoch, batch.number) for batch in later] == [(4, 2), (4, 3)]
    assert [batch.samples.tolist() for batch in later] == epoch(plan, 4)[2:].tolist()
