"""An aggregation as a reader of its contract would write one: L2D-L over twice as many rows."""

from collections.abc import Sequence
from dataclasses import replace

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.index.aggregations import l2d_local
from l2d_ray.index.exchange import Exchange

NAME = "twice"
DESCRIPTION = "L2D-L, from twice as many training sequences"
TUNED_OPTION = "top_m"


def recommend(queries_UD: Float64, queries: Sequence[Query]) -> Exchange[list[ScoredItems]]:
    return (yield from l2d_local.recommend(queries_UD, [replace(query, top_m=2 * query.top_m) for query in queries]))
