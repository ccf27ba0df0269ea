"""Aggregations by name: batches of mixed queries, unknown names, and an aggregation that is added here."""

import pickle
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from support.small_memory import DIMENSION, indexed, rows

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import ScoredItems, best_items, last_row, squared_distances
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.index import aggregations
from l2d_ray.index.aggregations import AGGREGATIONS, l2d_local
from l2d_ray.index.exchange import Exchange, Request, drive
from l2d_ray.index.shard import IndexShard


def vote(queries_UD: Float64, queries: Sequence[Query]) -> Exchange[list[ScoredItems]]:
    """Score an item by the number of its rows among the M nearest."""
    near = yield Request(l2d_local.nearest_rows, (queries_UD, [query.top_m for query in queries]))
    last_rows = [last_row(parts, query.top_m) for parts, query in zip(zip(*near, strict=True), queries, strict=True)]
    counted = yield Request(count_rows, (last_rows,), per_shard=near)
    lists = zip(zip(*counted, strict=True), queries, strict=True)
    return [
        best_items([part.permitted(query.exclude, query.allow) for part in parts], query.k) for parts, query in lists
    ]


def count_rows(shard: IndexShard, last_rows: Sequence, near: Sequence) -> list[ScoredItems]:
    kept = [shard.read_rows(one.up_to(last).rows_M)[1] for one, last in zip(near, last_rows, strict=True)]
    return [ScoredItems(items.astype(np.int64), counts.astype(float)) for items, counts in map(unique, kept)]


def unique(items_M: NDArray) -> tuple[NDArray, NDArray]:
    return np.unique(items_M, return_counts=True)


VOTES = SimpleNamespace(NAME="votes", DESCRIPTION="votes of the nearest rows", recommend=vote)


@pytest.fixture
def with_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AGGREGATIONS, VOTES.NAME, VOTES)


def random_states(count: int = 6) -> NDArray[np.float16]:
    random = np.random.default_rng(4)
    return rows(600, 40)[0][:count] + random.standard_normal((count, DIMENSION)).astype(np.float16)


def votes_by_definition(query_D: FloatArray, exclude: IntArray, top_m: int) -> list[tuple[int, float]]:
    """Count the items of the M nearest rows of the whole memory, one by one."""
    memory, samples = rows(600, 40)
    ids, items = samples["sample_id"].to_numpy(), samples["item_index"].to_numpy()
    nearest = np.lexsort((ids, squared_distances(query_D, memory)))[:top_m]
    counts = np.bincount(items[nearest], minlength=40)
    voted = [(item, float(counts[item])) for item in range(40) if counts[item] and item not in exclude]
    return sorted(voted, key=lambda pair: (-pair[1], pair[0]))


def test_an_added_aggregation_is_searched_by_its_name_and_equals_its_definition(
    tmp_path: Path, with_votes: None
) -> None:
    index, states = indexed(tmp_path, num_shards=3, space="none"), random_states()
    queries = [Query([0], 7, np.array([2, 3]), aggregation="votes", top_m=top_m) for top_m in (1, 5, 40, 40, 600, 9999)]
    for state, query, found in zip(states, queries, index.recommend(states, queries), strict=True):
        expected = votes_by_definition(state, query.exclude, query.top_m)[:7]
        assert list(zip(found.items_I.tolist(), found.scores_I.tolist(), strict=True)) == expected


def test_the_http_interface_accepts_and_documents_an_added_aggregation(with_votes: None) -> None:
    """The schemas are made when their module is imported, so a fresh copy of it is run here."""
    request = runpy.run_module("l2d_ray.serve.schemas")["RecommendRequest"]
    assert request(history=["a"], aggregation="votes").aggregation == "votes"
    field = request.model_json_schema()["properties"]["aggregation"]
    assert field["enum"] == ["global", "local", "posterior", "votes"]
    assert "`votes`: votes of the nearest rows" in field["description"]
    with pytest.raises(ValidationError, match="Input should be 'global', 'local', 'posterior' or 'votes'"):
        request(history=["a"], aggregation="both")


def test_queries_of_one_batch_are_answered_as_each_alone(tmp_path: Path, with_votes: None) -> None:
    """They differ in aggregation, K, M, excluded and allowed items; the index is approximate."""
    index, states = indexed(tmp_path, factory="IVF16,PQ4x4", target_recall=0.5), random_states(8)
    queries = [
        Query([0], 5),
        Query([0], 30, aggregation="local", top_m=3),
        Query([0], 3, np.arange(10), aggregation="votes", top_m=200),
        Query([0], 9, allow=np.array([1, 4, 9])),
        Query([0], 9, np.array([4]), np.array([1, 4, 9, 16]), "local", 50),
        Query([0], 40, np.arange(30)),
        Query([0], 2, aggregation="local", top_m=3),
        Query([0], 1, aggregation="local", top_m=600),
    ]
    for number, found in enumerate(index.recommend(states, queries)):
        (alone,) = index.recommend(states[number : number + 1], [queries[number]])
        assert 0 < len(found) <= queries[number].k
        np.testing.assert_array_equal(found.items_I, alone.items_I)
        np.testing.assert_allclose(found.scores_I, alone.scores_I, rtol=1e-9)  # the map of one row rounds differently


def test_an_unknown_aggregation_is_refused_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"aggregation='both': unknown; use global or local or posterior"):
        indexed(tmp_path).recommend(random_states(2), [Query([0]), Query([0], aggregation="both")])


def test_a_history_that_is_not_finite_finds_nothing(tmp_path: Path) -> None:
    index, broken = indexed(tmp_path), np.full((1, DIMENSION), np.nan, np.float16)
    for options in ({}, {"allow": np.arange(40)}, {"aggregation": "local"}):
        (found,) = index.recommend(broken, [Query([0], **options)])
        assert len(found) == 0


@pytest.mark.parametrize("name", aggregations.offered(posterior=False))
def test_requests_can_be_split_over_processes(tmp_path: Path, name: str) -> None:
    index, states = indexed(tmp_path, num_shards=3), random_states()
    queries = [Query([0], 30, aggregation=name, top_m=20)] * len(states)
    groups = index.shards[:1], [], index.shards[1:]

    def send(request: Request) -> list:
        shares = [pickle.loads(pickle.dumps(share)) for share in request.split(map(len, groups))]
        return [answer for share, group in zip(shares, groups, strict=True) for answer in share.answer(group)]

    found = drive(aggregations.recommend(index.space(states), queries), send)
    for one, other in zip(found, index.recommend(states, queries), strict=True):
        np.testing.assert_array_equal(one.items_I, other.items_I)
        np.testing.assert_array_equal(one.scores_I, other.scores_I)
