"""The terms of log p(v | history), and the last items after which v is probable.

    log p(v | history) = state + transitions + popularity + repetition + normalisation

    state           TAU (m_v . h - |m_v|^2 / 2)
    transitions     W log(p(v | last items) / p(v))
    popularity      W log p(v), plus log UNSEEN for an item without training samples
    repetition      log REPEAT for an item of the history, else 0
    normalisation   -log Z

All terms are in nats. `core.posterior` has the symbols. The first term is 0 for an item at the mean of all items. The
second is 0 for an item that follows the last items as often as it follows any.

Shapes: V items of a shard, K of them to explain, A ages of last items.
"""

from dataclasses import dataclass

import numpy as np

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.posterior import ItemScorer
from l2d_ray.core.query import History, indexed_items
from l2d_ray.core.transitions import last_items


@dataclass(frozen=True)
class ItemExplanation:
    """The explanation of one item's score."""

    terms: dict[str, float]
    """Terms in nats, by name. They add up to the score."""
    after: dict[int, float]
    """Share of p(v | last items) that comes from training samples of v after one of the last items, by that item.

    The largest share is first. The rest of p(v | last items) comes from popularity.
    """
    sample_ids: list[int]
    """Samples of the memory rows of the item that are nearest to the state of the history, the nearest first."""


def terms(scorer: ItemScorer, query_D: Float64, history: History) -> dict[str, Float64]:
    """Return the terms [V] of `ItemScorer.log_scores`, by name: all but the normalisation."""
    parameters, transitions = scorer.parameters, scorer.transitions
    prior_V = transitions.probabilities(history, parameters.mixture)
    seen_V = np.isin(scorer.items_V, indexed_items(history))
    popularity_V = parameters.prior_weight * np.log(transitions.popularity_V)
    others = {
        "transitions": parameters.prior_weight * np.log(prior_V / transitions.popularity_V),
        "popularity": popularity_V + np.where(scorer.unseen_V, np.log(parameters.unseen), 0.0),
        "repetition": np.where(seen_V, np.log(parameters.repeat), 0.0),
    }
    return {"state": scorer.log_scores(query_D, history) - sum(others.values())} | others


def shares_after(scorer: ItemScorer, history: History, places_K: IntArray) -> list[dict[int, float]]:
    """Return for some items the share of p(v | last items) after each last item (`ItemExplanation.after`).

    `places_K` are places in `scorer.items_V`.
    """
    mixture, transitions = scorer.parameters.mixture, scorer.transitions
    (items_A,) = items_UA = last_items([history])
    (weights_A,), _ = transitions.weights(items_UA, mixture)
    counts_AK = transitions.counts_IV[np.maximum(items_A, 0)][:, places_K].toarray()
    shares_AK = weights_A[:, None] * counts_AK / transitions.probabilities(history, mixture)[places_K]
    explained = []
    for shares_A in shares_AK.T:
        shares: dict[int, float] = {}
        for item, share in zip(items_A.tolist(), shares_A.tolist(), strict=True):
            if share > 0:
                shares[item] = shares.get(item, 0.0) + share
        explained.append(dict(sorted(shares.items(), key=lambda one: -one[1])))
    return explained
