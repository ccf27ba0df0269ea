"""L2D-G and L2D-L over any sharding against their definitions, written out as loops."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.l2d_definitions import l2d_global, l2d_local

from l2d_ray.core.decoding import (
    ALL_ROWS,
    NO_ITEMS,
    ScoredItems,
    aggregate,
    best_items,
    best_of_all,
    completed,
    last_row,
    nearest,
    squared_distances,
)

SEEDS = st.integers(0, 2**32 - 1)


def coarse(random: np.random.Generator, *shape: int) -> NDArray[np.float16]:
    """Return small integers, so that distances often tie and rows repeat."""
    return random.integers(0, 3, shape).astype(np.float16)


def plain_local(query: NDArray, rows: NDArray, ids: NDArray, items: NDArray, top_m: int, k: int) -> list:
    """Score items by the definition: M nearest rows, the mean of each item's rows among them, 1 / distance."""
    ranked = sorted(range(len(rows)), key=lambda j: (np.sum((rows[j].astype(float) - query) ** 2), ids[j]))[:top_m]
    by_item: dict[int, list[NDArray]] = {}
    for j in ranked:
        by_item.setdefault(int(items[j]), []).append(rows[j].astype(float))
    distances = {item: np.linalg.norm(np.mean(of_item, axis=0) - query) for item, of_item in by_item.items()}
    scores = {item: np.inf if d == 0 else 1 / d for item, d in distances.items()}
    return sorted(scores.items(), key=lambda pair: (-round(pair[1], 9), pair[0]))[:k]


@given(
    rows=st.integers(0, 40),
    num_items=st.integers(1, 12),
    num_shards=st.integers(1, 7),
    top_m=st.integers(1, 60),
    k=st.integers(1, 20),
    seed=SEEDS,
)
def test_sharded_l2d_l_equals_its_definition(
    rows: int, num_items: int, num_shards: int, top_m: int, k: int, seed: int
) -> None:
    """Covers any sharding by item, ties, duplicates, M beyond the memory and K beyond the catalogue."""
    random = np.random.default_rng(seed)
    states, query = coarse(random, rows, 3), coarse(random, 3)
    items, ids = random.integers(0, num_items, rows), random.permutation(rows) - rows // 2
    shard_of = random.integers(0, num_shards, num_items)
    shards = [np.flatnonzero(shard_of[items] == shard) for shard in range(num_shards)]

    near = [
        nearest(squared_distances(query, states[rows_M]), ids[rows_M], np.arange(rows_M.size), top_m)
        for rows_M in shards
    ]
    last = last_row(near, top_m)
    survivors = [rows_M[part.up_to(last).rows_M] for rows_M, part in zip(shards, near, strict=True)]
    result = best_items([aggregate(query, states[rows_M], items[rows_M]) for rows_M in survivors], k)

    assert sum(map(len, survivors)) == min(top_m, rows)
    whole = l2d_local(query, states, ids, items, top_m, k)
    np.testing.assert_array_equal(result.items_I, whole.items_I)
    np.testing.assert_array_equal(result.scores_I, whole.scores_I)
    expected = plain_local(query.astype(float), states, ids, items, top_m, k)
    np.testing.assert_allclose(result.scores_I, [score for _, score in expected])
    assert set(result.items_I.tolist()) <= set(items.tolist())


@given(st.integers(1, 15), st.integers(1, 20), SEEDS)
def test_l2d_g_equals_its_definition(num_items: int, k: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    centroids, query = coarse(random, num_items, 2), coarse(random, 2)
    result = l2d_global(query, centroids, np.arange(num_items), k)
    distances = np.linalg.norm(centroids.astype(float) - query, axis=1)
    order = sorted(range(num_items), key=lambda item: (distances[item], item))[:k]
    assert result.items_I.tolist() == order
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(result.scores_I, 1 / distances[order])


def test_identical_vectors_score_infinity_and_not_nan() -> None:
    query = np.array([1.0, 2.0])
    result = l2d_global(query, np.array([[1.0, 2.0], [1.0, 4.0]]), np.array([0, 1]), 2)
    assert result.scores_I.tolist() == [np.inf, 0.5]


def test_a_short_list_is_completed_from_l2d_g_and_scores_never_rise() -> None:
    local = ScoredItems(np.array([7, 3]), np.array([5.0, 2.0]))
    everywhere = ScoredItems(np.array([4, 7, 9, 1]), np.array([3.0, 2.5, 1.5, 1.0]))
    none = np.empty(0, np.int64)
    filled = completed(local, everywhere, 4, none, None)
    assert filled.items_I.tolist() == [7, 3, 4, 9]
    assert filled.scores_I.tolist() == [5.0, 2.0, 2.0, 1.5]
    assert completed(NO_ITEMS, everywhere, 2, none, None).scores_I.tolist() == [3.0, 2.5]
    cut = completed(local, everywhere, 4, np.array([3, 4]), np.array([7, 3, 1]))
    assert (cut.items_I.tolist(), cut.scores_I.tolist()) == ([7, 1], [5.0, 1.0])


def test_m_beyond_the_memory_keeps_all_rows() -> None:
    part = nearest(np.array([4.0, 1.0]), np.array([10, 11]), np.arange(2), 5)
    assert part.sample_ids_M.tolist() == [11, 10]
    assert last_row([part], 5) == ALL_ROWS
    assert part.up_to(ALL_ROWS).rows_M.tolist() == [1, 0]


@given(
    seed=SEEDS,
    count=st.integers(0, 40),
    k=st.integers(1, 45),
    exclude=st.lists(st.integers(-3, 45), max_size=20),
    allow=st.none() | st.lists(st.integers(-3, 45), max_size=40),
)
def test_the_best_of_all_items_are_those_of_a_full_sort(
    seed: int, count: int, k: int, exclude: list[int], allow: list[int] | None
) -> None:
    scores = np.random.default_rng(seed).integers(0, 6, count).astype(float)
    scores[scores == 0] = -np.inf
    permitted = [
        item for item in range(count) if scores[item] > 0 and item not in exclude and (allow is None or item in allow)
    ]
    found = best_of_all(
        scores.copy(), k, np.unique(np.array(exclude, int)), None if allow is None else np.unique(np.array(allow, int))
    )
    assert found.items_I.tolist() == sorted(permitted, key=lambda item: (-scores[item], item))[:k]
    assert found.scores_I.tolist() == scores[found.items_I].tolist()
