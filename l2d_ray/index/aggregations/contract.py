"""The contract that every aggregation module satisfies."""

from collections.abc import Sequence
from typing import Literal, Protocol

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.index.exchange import Exchange


class Aggregation(Protocol):
    """A way to score items against queries: a module with these names at its top level.

    The functions that run on a shard are in the module, too. They read the fields of `IndexShard`. A module may also
    have a function `recommend_at(queries_UD, queries, top_ms)`, as `aggregations.recommend_at` says.
    """

    NAME: str
    """Value of `Query.aggregation` that selects it."""
    DESCRIPTION: str
    """One clause for the documentation of the HTTP interface and the heading on the page."""
    TUNED_OPTION: Literal["prior", "top_m"] | None
    """The option that jobs/evaluate.py chooses for it on validation samples, if it has one."""

    def recommend(self, queries_UD: Float64, queries: Sequence[Query]) -> Exchange[list[ScoredItems]]:
        """Return for each query its K best permitted items over all shards, best first; scores never rise.

        `queries_UD` are the states of the queries, mapped into the space of the index.
        """
        ...
