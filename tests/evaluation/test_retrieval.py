"""Ranks against a brute-force full matrix; ties, groups, holes and copies; figures against torchmetrics-style formulas."""

from __future__ import annotations

from collections.abc import Mapping
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmrep.errors import LossError, MmrepError
from mmrep.evaluation.embeddings import EmbeddingCollector, Embeddings
from mmrep.evaluation.metrics import recall_at, share_interval, summarize
from mmrep.evaluation.ranks import BLOCK, count_right_ranks, tile_size
from mmrep.evaluation.retrieval import (
    Direction,
    all_directions,
    answerable,
    best_candidates,
    count_ranks,
    make_gallery,
    retrieve,
)
from mmrep.losses import ClusterSwapLoss, PairwiseCLIPLoss, SymileLoss, TriangleLoss
from tests.gloo_pool import GlooPool
from tests.losses.cases import unit_rows


def coarse(n: int, seed: int, holes: bool = True, groups: int | None = None) -> Embeddings:
    """Rows of few distinct values, so that scores tie often."""
    generator = torch.Generator().manual_seed(seed)
    rows = {name: torch.randint(-1, 2, (n, 3), generator=generator).float() for name in ("a", "b", "c")}
    present = {name: torch.rand(n, generator=generator) < (0.7 if holes else 2) for name in rows}
    labels = {} if groups is None else {"@group": torch.randint(0, groups, (n,), generator=generator)}
    return Embeddings(rows, present, labels, [str(i) for i in range(n)])


def brute_force(e: Embeddings, scorer: PairwiseCLIPLoss, direction: Direction) -> list[int]:
    """Ranks from the whole score matrix, by loops."""
    n = len(e)
    scores = scorer.score(
        target=direction.target, candidates=e.rows[direction.target], given={g: e.rows[g] for g in direction.given}
    )
    group = e.labels["@group"].tolist() if "@group" in e.labels else list(range(n))
    there = e.present[direction.target].tolist()
    ranks = []
    for q in range(n):
        right = [c for c in range(n) if there[c] and group[c] == group[q]]
        if right and all(e.present[g][q] for g in direction.given):
            best = max(float(scores[q, c]) for c in right)
            ranks.append(1 + sum(there[c] and group[c] != group[q] and float(scores[q, c]) >= best for c in range(n)))
    return ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 17), st.integers(0, 999), st.sampled_from([None, 2, 5]), st.integers(1, 9), st.booleans())
def test_ranks_equal_brute_force(n: int, seed: int, groups: int | None, tile: int, joint: bool) -> None:
    embeddings, loss = coarse(n, seed, groups=groups), PairwiseCLIPLoss(init_temperature=1.0)
    direction = Direction(("a", "b") if joint else ("a",), "c")
    queries = answerable(embeddings, direction)
    ranks = count_ranks(embeddings, loss, direction, make_gallery(embeddings, "c"), queries, tile)
    assert ranks.tolist() == brute_force(embeddings, loss, direction)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 150), st.integers(1, 300), st.sampled_from([1, 7, 64, 100, 1024]))
def test_equal_rows_tie_wherever_they_lie(seed: int, queries: int, candidates: int, tile: int) -> None:
    """Products of real numbers: the same row twice must score the same in any tile, or a copy would be beaten by chance."""
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(max(1, candidates // 3), 37, generator=generator)
    which = torch.randint(0, len(distinct), (candidates,), generator=generator)
    offered = torch.randint(0, 40, (candidates,), generator=generator)
    asking = offered[torch.randint(0, candidates, (queries,), generator=generator)]
    rows = {"q": torch.randn(queries, 37, generator=generator), "c": distinct[which]}
    n = queries + candidates
    embeddings = Embeddings(
        {"q": torch.cat([rows["q"], rows["c"]]), "c": torch.cat([rows["c"][:1].expand(queries, -1), rows["c"]])},
        {"q": torch.arange(n) < queries, "c": torch.arange(n) >= queries},
        {"@group": torch.cat([asking, offered])},
    )
    direction = Direction(("q",), "c")
    found = count_ranks(
        embeddings, PairwiseCLIPLoss(), direction, make_gallery(embeddings, "c"), torch.arange(queries), tile
    )
    exact = (rows["q"].double() @ distinct.double().T)[:, which]
    right = offered == asking[:, None]
    best = exact.masked_fill(~right, -torch.inf).argmax(dim=1, keepdim=True)
    better = (exact > exact.gather(1, best)) | (which == which[best])
    assert found.tolist() == (1 + (better & ~right).sum(dim=1)).tolist()


def test_right_answers_are_looked_for_where_they_can_be_and_tiles_are_bounded() -> None:
    n, tile, shapes = 1000, 128, []
    rows = unit_rows(("a",), n, 8)["a"]

    def score(queries: Tensor, candidates: Tensor) -> Tensor:
        shapes.append((len(queries), len(candidates)))
        return rows[queries] @ rows[candidates].T

    groups = torch.randperm(n, generator=torch.Generator().manual_seed(0))  # in no order at all
    assert (count_right_ranks(score, groups, groups, tile) == 1).all()
    tiles = -(-n // tile)
    assert max(max(shape) for shape in shapes) == tile and len(shapes) == tiles * tiles + tiles
    assert tile_size(torch.device("cpu")) % BLOCK == 0


def test_a_score_of_nan_counts_against_the_query() -> None:
    scores = torch.tensor([[1.0, torch.nan, 0.5], [torch.nan, 0.0, 0.0], [0.0, 1.0, 2.0]])
    groups = torch.arange(3)
    assert count_right_ranks(lambda q, c: scores[q][:, c], groups, groups, 2).tolist() == [2, 3, 1]


def test_a_gallery_smaller_than_k() -> None:
    figures = retrieve(coarse(4, 1, holes=False), PairwiseCLIPLoss())["a->b"]
    assert figures["candidates"] == 4 and figures["recall@5"] == figures["recall@10"] == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99))
def test_best_candidates_are_those_of_the_whole_matrix(n: int, k: int, seed: int) -> None:
    rows = {name: r.float() for name, r in unit_rows(("a", "b"), n, 16).items()}
    embeddings = Embeddings(rows, {name: torch.ones(n, dtype=torch.bool) for name in rows}, {})
    queries = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:5]
    with patch("mmrep.evaluation.retrieval.tile_size", return_value=8):
        found = best_candidates(
            embeddings, PairwiseCLIPLoss(), Direction(("a",), "b"), make_gallery(embeddings, "b"), queries, k
        )
    whole = rows["a"][queries].double() @ rows["b"].double().T
    assert found.tolist() == whole.topk(min(k, n), dim=1).indices.tolist()


def test_a_tie_counts_against_the_query() -> None:
    same = {name: torch.ones(4, 2) for name in ("a", "b")}
    everyone = {name: torch.ones(4, dtype=torch.bool) for name in same}
    figures = retrieve(Embeddings(same, everyone, {}), PairwiseCLIPLoss())["a->b"]
    assert figures["recall@1"] == 0 and figures["median_rank"] == 4 and figures["chance_recall@1"] == 0.25


def test_copies_of_one_item_are_one_candidate() -> None:
    """Two captions of one picture: the table holds the picture twice, the gallery once."""
    rows = {"image": torch.eye(3)[[0, 0, 1, 2]], "text": torch.eye(3)[[0, 0, 1, 2]]}
    present = {name: torch.ones(4, dtype=torch.bool) for name in rows}
    labels = {"@group": torch.tensor([7, 7, 8, 9]), "@content:image": torch.tensor([1, 1, 2, 3])}
    embeddings = Embeddings(rows, present, labels)
    gallery = make_gallery(embeddings, "image")
    assert gallery.samples.tolist() == [0, 2, 3] and gallery.groups.tolist() == [7, 8, 9]
    figures = retrieve(embeddings, PairwiseCLIPLoss())
    assert figures["text->image"]["candidates"] == 3 and figures["text->image"]["queries"] == 4
    assert figures["image->text"]["candidates"] == 4
    assert figures["text->image"]["chance_recall@1"] == pytest.approx(1 / 3)
    assert figures["image->text"]["chance_recall@1"] == pytest.approx((2 + 2 + 1 + 1) / 4 / 4)
    labels["@content:image"] = torch.tensor([1, 1, 1, 1])  # one picture under three names stays three candidates
    assert len(make_gallery(embeddings, "image").samples) == 3


def test_directions_of_any_number_of_modalities() -> None:
    assert [str(d) for d in all_directions(["text", "image"])] == ["image->text", "text->image"]
    three = [str(d) for d in all_directions(["text", "image", "audio"])]
    assert three[6:] == ["image+text->audio", "audio+text->image", "audio+image->text"] and len(three) == 9
    assert len(all_directions("abcdefghi")) == 9 * 8 + 9
    assert str(Direction.parse("text+audio->image", ["image", "text", "audio"])) == "audio+text->image"
    for wrong in ("text", "text->text", "text->imgae", "->image"):
        with pytest.raises(MmrepError, match="direction"):
            Direction.parse(wrong, ["image", "text"])


def test_no_query_gives_no_figures_rather_than_a_crash() -> None:
    e = coarse(5, 0, holes=False)
    e.present["c"][:] = False
    figures = retrieve(e, PairwiseCLIPLoss())
    assert figures["a->c"]["queries"] == 0 and figures["a->c"]["recall@1"] is None
    assert figures["c->a"]["queries"] == 0 and figures["a->b"]["queries"] == 5


def test_a_split_without_samples_has_no_figures_by_any_loss() -> None:
    e = Embeddings(
        {name: torch.zeros(0, 8) for name in "ab"}, {name: torch.zeros(0, dtype=torch.bool) for name in "ab"}, {}
    )
    for loss in (PairwiseCLIPLoss(), ClusterSwapLoss(modalities=["a", "b"], embed_dim=8, num_prototypes=4)):
        figures = retrieve(e, loss)
        assert set(figures) == {"a->b", "b->a"} and figures["a->b"]["recall@1"] is None, loss


def test_nan_is_an_error_and_not_a_perfect_rank() -> None:
    e = coarse(5, 0, holes=False)
    e.rows["a"][2] = torch.nan
    with pytest.raises(MmrepError, match="'a' hold NaN"):
        retrieve(e, PairwiseCLIPLoss())


class OnlyJoint(SymileLoss):
    """A loss that scores nothing but whole tuples."""

    def score(self, *, target: str, candidates: Tensor, given: Mapping[str, Tensor], present: object = None) -> Tensor:
        if len(given) < 2:
            raise LossError("needs all others")
        return super().score(target=target, candidates=candidates, given=given)


def test_what_a_loss_cannot_score_is_left_out_unless_asked_for() -> None:
    e = coarse(5, 0, holes=False)
    assert set(retrieve(e, OnlyJoint())) == {"b+c->a", "a+c->b", "a+b->c"}
    with pytest.raises(LossError):
        retrieve(e, OnlyJoint(), [Direction(("a",), "b")])


def test_summary_of_known_ranks() -> None:
    figures = summarize(np.array([1, 2, 4, 11]), candidates=20, chance=0.05)
    assert figures["recall@1"] == 0.25 and figures["recall@5"] == 0.75 and figures["recall@10"] == 0.75
    assert figures["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 11) / 4) and figures["median_rank"] == 3


def test_interval_is_the_bootstrap() -> None:
    hits = np.random.default_rng(1).random(200) < 0.3
    ranks = np.where(hits, 1, 2)
    rng = np.random.default_rng(2)
    literal = np.quantile([rng.choice(hits, 200).mean() for _ in range(4000)], [0.025, 0.975])
    assert np.allclose(share_interval(recall_at(ranks, 1), 200), literal, atol=0.012)


def sharded(rank: int, world: int) -> dict[str, dict[str, object]]:
    """Retrieval over the rows that ranks embedded one by one."""
    from mmrep.batch import Batch
    from mmrep.data.order import Contents
    from mmrep.data.plan import Plan

    e = coarse(11, 3, groups=4)
    collector = EmbeddingCollector()
    for planned in Plan([Contents.uniform([11])], 6, 0, train=False).batches(0, 0, rank, world):
        numbers = planned.samples
        real = torch.tensor(numbers) >= 0
        batch = Batch(
            {}, {n: p[numbers] & real for n, p in e.present.items()}, [str(n) if n >= 0 else "" for n in numbers],
            {n: label[numbers] for n, label in e.labels.items()},
        )  # fmt: skip
        collector.add(batch, {name: rows[numbers] for name, rows in e.rows.items()})
    gathered = collector.gathered()
    assert len(gathered) == 11
    return retrieve(gathered, PairwiseCLIPLoss())


def test_every_sample_counts_once_on_any_number_of_ranks(pool2: GlooPool, pool3: GlooPool) -> None:
    alone = sharded(0, 1)
    assert alone["a->b"]["queries"] == len(answerable(coarse(11, 3, groups=4), Direction(("a",), "b")))
    for pool in (pool2, pool3):
        for result in pool.run(sharded, [(rank, pool.world) for rank in range(pool.world)]):
            for direction, figures in alone.items():
                assert result[direction] == figures, direction


def lopsided(rank: int) -> list[str]:
    """One sample alone has modality a: one rank has its query, the other none."""
    rows = unit_rows(("a", "b", "c"), 4, 6)
    present = {name: torch.ones(4, dtype=torch.bool) for name in rows} | {"a": torch.arange(4) == 2}
    embeddings = Embeddings({name: r.float() for name, r in rows.items()}, present, {})
    return sorted(retrieve(embeddings, TriangleLoss()))


def test_a_direction_that_cannot_be_scored_is_left_out_on_every_rank(pool2: GlooPool) -> None:
    """Whoever has no query does not find out by scoring one, and must not wait for the others."""
    expected = ["a+b->c", "a+c->b", "b+c->a"]
    assert lopsided(0) == expected
    assert pool2.run(lopsided, [(0,), (1,)]) == [expected, expected]
