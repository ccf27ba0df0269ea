"""Aggregations: the ways to score the items of an index against queries, one module each.

A new aggregation is a module that satisfies `contract.Aggregation`, and one entry in `_MODULES`.
"""

from collections.abc import Sequence
from dataclasses import replace

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.index.aggregations import l2d_global, l2d_local, l2d_posterior
from l2d_ray.index.aggregations.contract import Aggregation
from l2d_ray.index.exchange import Exchange

_MODULES: tuple[Aggregation, ...] = (l2d_global, l2d_local, l2d_posterior)
AGGREGATIONS = {module.NAME: module for module in _MODULES}
"""All aggregations by name, as `Query.aggregation` has it."""


def offered(posterior: bool) -> dict[str, str]:
    """Return names and descriptions of the aggregations that an index offers.

    `posterior`: whether the parameters of that aggregation were fitted.
    """
    names = [name for name in AGGREGATIONS if posterior or name != l2d_posterior.NAME]
    return {name: AGGREGATIONS[name].DESCRIPTION for name in names}


def check_name(name: str) -> str:
    """Return the name of an aggregation. Raises InputError if it is unknown."""
    if name not in AGGREGATIONS:
        raise InputError(f"aggregation={name!r}: unknown; use {' or '.join(AGGREGATIONS)}")
    return name


def recommend(queries_UD: Float64, queries: Sequence[Query]) -> Exchange[list[ScoredItems]]:
    """Answer every query by the aggregation that it names. Raises InputError if there is no such aggregation."""
    lists = [NO_ITEMS] * len(queries)
    for name in dict.fromkeys(check_name(query.aggregation) for query in queries):
        users = [user for user, query in enumerate(queries) if query.aggregation == name]
        found = yield from AGGREGATIONS[name].recommend(queries_UD[users], [queries[user] for user in users])
        for user, items in zip(users, found, strict=True):
            lists[user] = items
    return lists


def recommend_at(
    name: str, queries_UD: Float64, queries: Sequence[Query], top_ms: Sequence[int]
) -> Exchange[list[list[ScoredItems]]]:
    """Answer every query by one aggregation at several M; the aggregation and M of the queries are ignored.

    An aggregation shares one search among the values of M if its module has a function `recommend_at`.
    """
    module = AGGREGATIONS[check_name(name)]
    if hasattr(module, "recommend_at"):
        shared: list[list[ScoredItems]] = yield from module.recommend_at(queries_UD, queries, top_ms)
        return shared
    results = []
    for top_m in top_ms:
        results.append((yield from module.recommend(queries_UD, [replace(query, top_m=top_m) for query in queries])))
    return results
