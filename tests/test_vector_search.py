"""Candidates of any index, with the exact distances of the vectors themselves."""

from pathlib import Path

import numpy as np
import pytest
from support.small_memory import build, rows, states_near_rows, write_memory

from l2d_ray.index.engine import engine
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.index.vector_search import VectorSearch


def test_a_lossy_index_returns_the_distances_of_the_rows_themselves(tmp_path: Path) -> None:
    workspace = write_memory(tmp_path, num_shards=1)
    shard = ShardedIndex.open(workspace, build(workspace, factory="PQ4x4", space="none")[0].manifest).shards[0]
    memory, samples = rows(600, 40)
    row_of_id = dict(zip(samples["sample_id"].to_pylist(), memory.astype(float), strict=True))
    query = states_near_rows(1)[0]
    (found,) = shard.nearest_rows(query[None], 20)
    expected = [np.square(row_of_id[i] - query).sum() for i in found.sample_ids_M.tolist()]
    np.testing.assert_allclose(found.distances_M, expected)
    assert (np.diff(found.distances_M) >= 0).all()


def test_ties_beyond_the_margin_are_all_found() -> None:
    """Sample ids decide which of 1,000 identical vectors are the M nearest, so the search must return all of them."""
    vectors = np.ones((1000, 3), np.float16)
    ((numbers, distances),) = VectorSearch.over(vectors, np.zeros(3)).search(np.zeros((1, 3)), 5)
    assert numbers.tolist() == list(range(1000))
    assert set(distances.tolist()) == {3.0}


def test_a_common_offset_costs_no_precision() -> None:
    """Far from the origin, float32 squares would swallow the differences."""
    random = np.random.default_rng(0)
    vectors = 3000 + random.standard_normal((500, 16)).astype(np.float32)
    search = VectorSearch.over(vectors, vectors.mean(axis=0).astype(float))
    ((numbers, _),) = search.search(vectors[:1], 10)
    assert numbers.size < 100  # the tolerance stays small
    assert 0 in numbers


def test_a_scan_of_blocks_finds_what_an_index_in_memory_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("l2d_ray.index.vector_search._ROWS_PER_BLOCK", 7)
    vectors = np.random.default_rng(0).integers(0, 3, (100, 4)).astype(np.float16)  # many ties
    queries = np.vstack([vectors[:5].astype(float), np.full((1, 4), np.nan)])
    scanned = VectorSearch.scan(vectors, np.zeros(4)).search(queries, 10)
    for one, other in zip(scanned, VectorSearch.over(vectors, np.zeros(4)).search(queries, 10), strict=True):
        np.testing.assert_array_equal(one, other)
    assert scanned[-1][0].size == 0  # a query that is not finite


def test_a_wider_search_is_of_the_engine_or_of_more_candidates() -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    index = engine.create("IVF4,Flat", 4)
    index.train(vectors)
    index.add(vectors)
    search = VectorSearch(index, vectors, np.zeros(4))
    assert index.narrowest_search() == "nprobe=1"
    assert search.wider_searches("nprobe=1") == ["nprobe=2", "nprobe=1,k_factor=2"]
    assert search.wider_searches("nprobe=4,k_factor=32") == ["nprobe=4,k_factor=64"]
    assert search.wider_searches("nprobe=4,k_factor=64") == []
    search.set_search("nprobe=4,k_factor=8")
    assert search.k_factor == 8
    assert search.search(vectors[:1], 100)[0][0].size == 100  # all four lists
    assert VectorSearch.over(vectors, np.zeros(4)).wider_searches("") == ["k_factor=2"]
