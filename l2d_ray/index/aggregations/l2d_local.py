"""L2D-L: score an item by the distance from the query to the mean of those of its rows that are among the M nearest.

Where that gives fewer than K items, the list is completed from L2D-G.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from l2d_ray.core.arrays import Float64, FloatArray
from l2d_ray.core.decoding import LastRow, Neighbours, ScoredItems, aggregate, best_items, completed, last_row
from l2d_ray.core.query import Query
from l2d_ray.index.aggregations import l2d_global
from l2d_ray.index.exchange import Exchange, Request
from l2d_ray.index.shard import IndexShard

NAME = "local"
DESCRIPTION = "L2D-L, from the M training sequences nearest to the history"
TUNED_OPTION: Literal["prior", "top_m"] | None = "top_m"


def recommend(queries_UD: Float64, queries: Sequence[Query]) -> Exchange[list[ScoredItems]]:
    """Recommend by L2D-L, in two rounds, and one of L2D-G where a list is too short."""
    near = yield Request(nearest_rows, (queries_UD, [query.top_m for query in queries]))
    return (yield from _from_rows(queries_UD, queries, near))


def recommend_at(
    queries_UD: Float64, queries: Sequence[Query], top_ms: Sequence[int]
) -> Exchange[list[list[ScoredItems]]]:
    """Recommend at several M, from one search with the largest; `Query.top_m` is ignored.

    An approximate index may find slightly more for a smaller M than a search with that M would.
    """
    near = yield Request(nearest_rows, (queries_UD, [max(top_ms)] * len(queries)))
    results = []
    for top_m in top_ms:
        first = [[neighbours.first(top_m) for neighbours in of_shard] for of_shard in near]
        results.append((yield from _from_rows(queries_UD, [replace(query, top_m=top_m) for query in queries], first)))
    return results


def _from_rows(
    queries_UD: Float64, queries: Sequence[Query], near: Sequence[Sequence[Neighbours]]
) -> Exchange[list[ScoredItems]]:
    """Recommend from the top M rows of each shard, for each query."""
    by_query = zip(zip(*near, strict=True), queries, strict=True)
    last_rows = [last_row(neighbours, query.top_m) for neighbours, query in by_query]
    averaged = yield Request(average_rows, (queries_UD, last_rows), per_shard=near)
    found = [best_items(lists, sum(map(len, lists))) for lists in zip(*averaged, strict=True)]
    results = [items.permitted(query.exclude, query.allow) for items, query in zip(found, queries, strict=True)]
    short = [user for user, query in enumerate(queries) if len(results[user]) < query.k]
    if short:
        # L2D-G ranks the items that L2D-L has found, too: ask for as many more.
        longer = [replace(queries[user], k=queries[user].k + len(found[user])) for user in short]
        filling = yield from l2d_global.recommend(queries_UD[short], longer)
        for user, more in zip(short, filling, strict=True):
            query = queries[user]
            results[user] = completed(found[user], more, query.k, query.exclude, query.allow)
    return [items.first(query.k) for items, query in zip(results, queries, strict=True)]


def nearest_rows(shard: IndexShard, queries_UD: FloatArray, top_ms: Sequence[int]) -> list[Neighbours]:
    """Return for each query the top M rows of this shard. Queries that share M are searched together."""
    found: dict[int, Neighbours] = {}
    for top_m in set(top_ms):
        users = [user for user, wanted in enumerate(top_ms) if wanted == top_m]
        found |= zip(users, shard.nearest_rows(queries_UD[users], top_m), strict=True)
    return [found[user] for user in range(len(top_ms))]


def average_rows(
    shard: IndexShard, queries_UD: FloatArray, last_rows: Sequence[LastRow], near: Sequence[Neighbours]
) -> list[ScoredItems]:
    """Return for each query the items of the rows up to its last row, scored by the means of these rows."""
    kept = [neighbours.up_to(last).rows_M for neighbours, last in zip(near, last_rows, strict=True)]
    return [aggregate(query_D, *shard.read_rows(rows_M)[:2]) for query_D, rows_M in zip(queries_UD, kept, strict=True)]
