"""How much an index loses against looking at every row, and the least effort that keeps it small."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.decoding import IntArray, best_items, global_cut
from l2d_ray.index import faiss_index
from l2d_ray.index.faiss_index import Scan, VectorSearch
from l2d_ray.index.manifest import IndexQuality
from l2d_ray.index.shard import IndexShard

QUALITY_QUERIES, QUALITY_TOP_M, QUALITY_K = 200, 200, 20


def tune(shards: Sequence[IndexShard], target: float) -> tuple[str, IndexQuality]:
    """The least search setting whose top K agrees with the exact one to `target`, or the widest; and what it gives.

    Queries are rows of the memory, each left out of its own neighbours. The setting stays in force.
    """
    step = max(1, sum(shard.sample_ids_M.size for shard in shards) // QUALITY_QUERIES)
    chosen = [np.arange(0, shard.sample_ids_M.size, step) for shard in shards]
    queries = np.concatenate([s.rows.vectors_ND[rows] for s, rows in zip(shards, chosen, strict=True)])
    own_ids = np.concatenate([shard.sample_ids_M[rows] for shard, rows in zip(shards, chosen, strict=True)])
    exact = _lists([replace(s, rows=Scan(s.rows.vectors_ND, s.rows.offset_D)) for s in shards], queries, own_ids)
    settings = next((faiss_index.search_settings(_faiss(shard)) for shard in shards if len(shard.row_items_M)), [])
    for setting in settings or [""]:
        for shard in shards:
            if setting:
                faiss_index.set_search(_faiss(shard), setting)
        found = _lists(shards, queries, own_ids)
        quality = IndexQuality(
            queries=len(queries),
            top_m=QUALITY_TOP_M,
            recall_top_m=_overlap([rows for rows, _ in found], [rows for rows, _ in exact]),
            k=QUALITY_K,
            recall_top_k=_overlap([items for _, items in found], [items for _, items in exact]),
        )
        if quality.recall_top_k >= target:
            break
    return setting, quality


def _faiss(shard: IndexShard) -> Any:
    assert isinstance(shard.rows, VectorSearch)
    return shard.rows.index


def _lists(
    shards: Sequence[IndexShard], queries_UD: NDArray[np.float16], own_ids_U: IntArray
) -> list[tuple[IntArray, IntArray]]:
    """For each query the ids of its top M rows and its top K items by L2D-L, its own row left out."""
    hops = [shard.nearest_rows(queries_UD, QUALITY_TOP_M + 1) for shard in shards]
    others = [
        [part.keep(part.sample_ids_M != own_id) for part, own_id in zip(parts, own_ids_U, strict=True)]
        for parts in hops
    ]
    cuts = [global_cut(parts, QUALITY_TOP_M) for parts in zip(*others, strict=True)]
    items = [s.aggregate_rows(queries_UD, own, cuts) for s, own in zip(shards, others, strict=True)]
    return [
        (np.concatenate([part.up_to(cut).sample_ids_M for part in parts]), best_items(found, QUALITY_K).items_I)
        for cut, parts, found in zip(cuts, zip(*others, strict=True), zip(*items, strict=True), strict=True)
    ]


def _overlap(found: Sequence[IntArray], exact: Sequence[IntArray]) -> float:
    hits = sum(int(np.isin(ours, theirs).sum()) for ours, theirs in zip(found, exact, strict=True))
    wanted = sum(theirs.size for theirs in exact)
    return round(hits / wanted, 5) if wanted else 1.0
