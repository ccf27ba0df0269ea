"""The search setting that reaches a target recall."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.small_memory import build, by_local, write_memory

from l2d_ray.core.space import LinearMap
from l2d_ray.index.engine import engine
from l2d_ray.index.shard import IndexShard, Segment
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.index.tuning import tune
from l2d_ray.index.vector_search import VectorSearch


def shard_of(factory: str, vectors: NDArray[np.float16], items: NDArray, ids: NDArray) -> IndexShard:
    """Return all rows in one shard, not mapped."""
    index, zero = engine.create(factory, vectors.shape[1]), np.zeros(vectors.shape[1])
    index.train(vectors.astype(np.float32))
    index.add(vectors.astype(np.float32))
    means = np.stack([vectors[items == item].mean(axis=0) for item in range(items.max() + 1)]).astype(np.float32)
    return IndexShard(
        segments=[Segment(VectorSearch(index, vectors, zero), items.astype(np.int32), ids)],
        centroids=VectorSearch.over(means, zero),
        items_I=np.arange(len(means), dtype=np.int32),
        counts_I=np.bincount(items),
    )


@pytest.mark.parametrize("factory", ["HNSW16", "IVF64,PQ4"])
def test_the_target_holds_at_any_m_for_other_queries(factory: str) -> None:
    """Tuned at M = 200 alone, HNSW16 finds 0.91 of the exact top K at 1,000.

    Tuned at 1,000 alone, the codes find 0.98 at 200.
    """
    random = np.random.default_rng(0)
    means, items = random.standard_normal((300, 16)), random.integers(0, 300, 6000)
    vectors = (means[items] + random.standard_normal((6000, 16))).astype(np.float16)
    states = (means[random.integers(0, 300, 200)] + random.standard_normal((200, 16))).astype(np.float16)
    shard, exact = (shard_of(name, vectors, items, np.arange(6000)) for name in (factory, "Flat"))
    quality = tune([shard], target=0.99)[1]
    assert quality.recall_top_k >= 0.99
    for top_m in (20, 200, 1000):
        both = [by_local(ShardedIndex(LinearMap(), [one]), states, 20, top_m) for one in (shard, exact)]
        agree = [np.isin(found.items_I, best.items_I).mean() for found, best in zip(*both, strict=True)]
        assert np.mean(agree) > 0.985


@pytest.mark.parametrize(("rows_per_state", "widest"), [(1200, "nprobe=1"), (400, "nprobe=4")])
def test_rows_at_the_same_distance_are_no_loss(rows_per_state: int, widest: str) -> None:
    """Three states, each row of another item: sample ids decide which of the tied rows are among the M nearest.

    If the 1,000 nearest rows include all states, all of them must be found, although no top K can show it.
    """
    random = np.random.default_rng(0)
    vectors = np.repeat(random.standard_normal((3, 8)), rows_per_state, axis=0).astype(np.float16)
    ids = random.permutation(len(vectors))
    for factory, expected in (("Flat", ""), ("IVF4,Flat", widest)):
        search, quality = tune([shard_of(factory, vectors, np.arange(len(vectors)), ids)], target=1.0)
        assert (quality.recall_top_m, quality.recall_top_k) == (1, 1)
        assert search == expected


def test_rows_confused_by_their_codes_are_found_with_more_candidates(tmp_path: Path) -> None:
    """With 16 codes for 600 rows, searching more inverted lists finds no more."""
    manifest = build(write_memory(tmp_path), factory="IVF4,PQ1x4", target_recall=1.0)[1]
    assert manifest.quality.recall_top_k == 1
    assert "k_factor" in manifest.search
