"""L2D-G: score an item by the distance from the query to the mean of all its memory rows."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import ScoredItems, best_items, scores_of
from l2d_ray.core.query import Query
from l2d_ray.index.exchange import Exchange, Request
from l2d_ray.index.shard import IndexShard

NAME = "global"
DESCRIPTION = "L2D-G, from all training sequences of an item"
TUNED_OPTION: Literal["prior", "top_m"] | None = "prior"


def recommend(queries_UD: Float64, queries: Sequence[Query]) -> Exchange[list[ScoredItems]]:
    """Recommend by L2D-G, in one round."""
    found = yield Request(nearest_items, (queries_UD, queries))
    return [best_items(lists, query.k) for lists, query in zip(zip(*found, strict=True), queries, strict=True)]


def nearest_items(shard: IndexShard, queries_UD: FloatArray, queries: Sequence[Query]) -> list[ScoredItems]:
    """Return for each query the K best permitted items of this shard."""
    unlimited = [user for user, query in enumerate(queries) if query.allow is None]
    count = max((queries[user].k + queries[user].exclude.size for user in unlimited), default=0)
    found = dict(zip(unlimited, shard.centroids.search(queries_UD[unlimited], count), strict=True))
    lists = []
    for user, query in enumerate(queries):
        numbers, distances_I = found[user] if query.allow is None else _within(shard, queries_UD[user], query.allow)
        items = ScoredItems(shard.items_I[numbers].astype(np.int64), scores_of(distances_I))
        lists.append(best_items([items.permitted(query.exclude)], query.k))
    return lists


def _within(shard: IndexShard, query_D: FloatArray, allow: IntArray) -> tuple[IntArray, Float64]:
    """Return the positions of the allowed items and their squared distances; none for a query that is not finite."""
    numbers = np.flatnonzero(np.isin(shard.items_I, allow) & np.isfinite(query_D).all())
    return numbers, shard.centroids.distances(query_D, numbers)
