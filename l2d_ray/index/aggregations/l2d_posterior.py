"""The probability of each item after a history: the score of L2D-G's item means, times a prior from the last items.

`core.posterior` has the formula. Every item of the catalogue is a candidate, with memory rows or without, and a shard
scores all of its items, so that the probabilities add up to 1. Scores are natural logarithms of probabilities.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_items, first_items
from l2d_ray.core.posterior import ItemScorer, log_sum_exp
from l2d_ray.core.query import Query
from l2d_ray.errors import InputError
from l2d_ray.index.exchange import Exchange, Request
from l2d_ray.index.shard import IndexShard

NAME = "posterior"
DESCRIPTION = "L2D with transitions, the probability of each item"
TUNED_OPTION: Literal["prior", "top_m"] | None = None


class ShardScores(NamedTuple):
    """The best items of a shard, with scores up to log Z, and the shard's part of Z."""

    items: ScoredItems
    log_sum: float


def recommend(queries_UD: Float64, queries: Sequence[Query]) -> Exchange[list[ScoredItems]]:
    """Recommend by probability, in one round. Raises InputError if the parameters were not fitted for the index."""
    found: list[list[ShardScores]] = yield Request(score_items, (queries_UD, queries))
    lists = []
    for shards, query in zip(zip(*found, strict=True), queries, strict=True):
        best = best_items([shard.items for shard in shards], query.k)
        log_z = np.logaddexp.reduce([shard.log_sum for shard in shards])
        lists.append(ScoredItems(best.items_I, best.scores_I - log_z))
    return lists


def score_items(shard: IndexShard, queries_UD: Float64, queries: Sequence[Query]) -> list[ShardScores]:
    """Return for each query the K best permitted items of this shard; none for a state that is not finite."""
    scorer = fitted(shard.scorer)
    results = []
    for query_D, query in zip(queries_UD, queries, strict=True):
        if not np.isfinite(query_D).all():
            results.append(ShardScores(NO_ITEMS, -np.inf))
            continue
        scores_V = scorer.log_scores(query_D, query.history)
        permitted = ScoredItems(scorer.items_V, scores_V).permitted(query.exclude, query.allow)
        results.append(ShardScores(first_items(permitted, query.k), log_sum_exp(scores_V)))
    return results


def fitted(scorer: ItemScorer | None) -> ItemScorer:
    """Return the scorer of an index. Raises InputError if its parameters were not fitted."""
    if scorer is None:
        raise InputError(
            f"aggregation={NAME!r}: the index has no parameters for it; run jobs/build_index.py with the dataset and"
            " the model of the memory"
        )
    return scorer
