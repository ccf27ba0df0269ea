"""Explanations of the scores of the aggregation `posterior`, from the shards that hold the items."""

import numpy as np

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import ScoredItems, nearest, squared_distances
from l2d_ray.core.explanation import ItemExplanation, shares_after, terms
from l2d_ray.core.query import History
from l2d_ray.index.aggregations.l2d_posterior import fitted
from l2d_ray.index.exchange import Exchange, Request
from l2d_ray.index.shard import IndexShard

NEAREST = 2
"""Memory rows that an explanation names."""


def explain(query_D: Float64, history: History, found: ScoredItems) -> Exchange[dict[int, ItemExplanation]]:
    """Explain items that the aggregation has found for a history, in one round; by item.

    `query_D` is the mapped state of the history. An item of a shard that does not answer is left out.
    The first term is named `title` for an item without memory rows.
    """
    answers: list[dict[int, ItemExplanation]] = yield Request(explain_items, (query_D, history, found))
    return {item: explanation for answer in answers for item, explanation in answer.items()}


def explain_items(
    shard: IndexShard, query_D: Float64, history: History, found: ScoredItems
) -> dict[int, ItemExplanation]:
    """Explain those of the items that belong to this shard."""
    scorer = fitted(shard.scorer)
    here_I = np.isin(found.items_I, scorer.items_V)
    items_K, scores_K = found.items_I[here_I], found.scores_I[here_I]
    places_K = np.searchsorted(scorer.items_V, items_K)
    named = {name: values_V[places_K].tolist() for name, values_V in terms(scorer, query_D, history).items()}
    row_items_M = np.concatenate([segment.row_items_M for segment in shard.segments])
    explained = {}
    for number, (item, after) in enumerate(zip(items_K.tolist(), shares_after(scorer, history, places_K), strict=True)):
        of_item = {name: values[number] for name, values in named.items()}
        if item not in shard.items_I:  # no rows: its place is what the title says
            of_item["title"] = of_item.pop("state")
        of_item["normalisation"] = float(scores_K[number]) - sum(of_item.values())
        explained[item] = ItemExplanation(
            of_item, after, _nearest_samples(shard, query_D, np.flatnonzero(row_items_M == item))
        )
    return explained


def _nearest_samples(shard: IndexShard, query_D: Float64, rows_M: IntArray) -> list[int]:
    """Return the samples of those of these rows that are nearest to the query."""
    vectors_MD, _, sample_ids_M = shard.read_rows(rows_M)
    near = nearest(squared_distances(query_D, vectors_MD), sample_ids_M, rows_M, NEAREST)
    samples: list[int] = near.sample_ids_M.tolist()
    return samples
