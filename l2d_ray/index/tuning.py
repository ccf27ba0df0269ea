"""How much an index loses against looking at every row, and a setting that keeps it small without much effort."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.decoding import IntArray, best_items, global_cut
from l2d_ray.index import faiss_index
from l2d_ray.index.faiss_index import Scan, VectorSearch
from l2d_ray.index.manifest import IndexQuality
from l2d_ray.index.shard import IndexShard

QUALITY_QUERIES, QUALITY_TOP_M, QUALITY_K = 200, 200, 20


def tune(shards: Sequence[IndexShard], target: float) -> tuple[str, IndexQuality]:
    """A search setting whose top K agrees with the exact one to `target`, and what it gives.

    From the narrowest on, the step that gains most is taken until the target is reached; if it is out of reach, the
    best of all that was tried is taken. It stays in force. Queries are rows of the memory, each left out of its own
    neighbours.
    """
    step = max(1, sum(shard.sample_ids_M.size for shard in shards) // QUALITY_QUERIES)
    chosen = [np.arange(0, shard.sample_ids_M.size, step) for shard in shards]
    queries = np.concatenate([s.rows.vectors_ND[rows] for s, rows in zip(shards, chosen, strict=True)])
    own_ids = np.concatenate([shard.sample_ids_M[rows] for shard, rows in zip(shards, chosen, strict=True)])
    exact = _lists([replace(s, rows=Scan(s.rows.vectors_ND, s.rows.offset_D)) for s in shards], queries, own_ids)
    indexes = [shard.rows for shard in shards if isinstance(shard.rows, VectorSearch)]

    def search(setting: str) -> IndexQuality:
        for index in indexes:
            index.set_search(setting)
        found = _lists(shards, queries, own_ids)
        return IndexQuality(
            queries=len(queries),
            top_m=QUALITY_TOP_M,
            recall_top_m=_overlap([rows for rows, _ in found], [rows for rows, _ in exact]),
            k=QUALITY_K,
            recall_top_k=_overlap([items for _, items in found], [items for _, items in exact]),
        )

    largest = max(indexes, key=lambda index: index.index.ntotal).index
    setting = faiss_index.narrowest_search(largest)
    tried = {setting: search(setting)}

    def gain(setting: str) -> tuple[float, float]:
        return tried[setting].recall_top_k, tried[setting].recall_top_m

    while gain(setting)[0] < target and (options := faiss_index.wider_searches(largest, setting)):
        tried |= {option: search(option) for option in options}
        setting = max(options, key=gain)
    best = max(tried, key=gain) if gain(setting)[0] < target else setting
    for index in indexes:
        index.set_search(best)
    return best, tried[best]


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
