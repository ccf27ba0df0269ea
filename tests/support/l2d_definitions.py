"""The definitions of L2D on a whole memory: what the search over shards must equal."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.decoding import ScoredItems, aggregate, best_items, nearest, scores_of, squared_distances
from l2d_ray.core.posterior import FLOOR, Parameters
from l2d_ray.core.transitions import PLACES


def l2d_global(query_D: FloatArray, means_ID: FloatArray, items_I: IntArray, k: int) -> ScoredItems:
    """Return the K items whose means are nearest."""
    return best_items([ScoredItems(items_I, scores_of(squared_distances(query_D, means_ID)))], k)


def l2d_local(
    query_D: FloatArray, rows_MD: FloatArray, sample_ids_M: IntArray, items_M: NDArray, top_m: int, k: int
) -> ScoredItems:
    """Return the K items whose means over the M nearest rows are nearest."""
    near = nearest(squared_distances(query_D, rows_MD), sample_ids_M, np.arange(len(rows_MD)), top_m)
    return best_items([aggregate(query_D, rows_MD[near.rows_M], items_M[near.rows_M])], k)


def transition_counts(histories: Sequence[Sequence[int]], num_items: int, lag_decay: float) -> Float64:
    """Return c(i, v) [I, I]; every item of a history but the first is a training target."""
    counts_II = np.zeros((num_items, num_items))
    for history in histories:
        for place in range(1, len(history)):
            for lag in range(1, min(place, PLACES) + 1):
                counts_II[history[place - lag], history[place]] += lag_decay ** (lag - 1)
    return counts_II


def prior(histories: Sequence[Sequence[int]], num_items: int, history: Sequence[int | str], p: Parameters) -> Float64:
    """Return p(v | last items) of each item, item by item."""
    counts_II = transition_counts(histories, num_items, p.lag_decay)
    popularity_I = np.full(num_items, FLOOR)
    for training in histories:
        np.add.at(popularity_I, training[1:], 1)
    popularity_I /= popularity_I.sum()
    prior_I, weights = np.zeros(num_items), 0.0
    for age, item in enumerate(list(history[::-1])[:PLACES]):
        smoothed_I = popularity_I
        if not isinstance(item, str):
            smoothed_I = (counts_II[item] + p.smoothing * popularity_I) / (counts_II[item].sum() + p.smoothing)
        prior_I, weights = prior_I + p.age_decay**age * smoothed_I, weights + p.age_decay**age
    return prior_I / weights


def log_posterior(
    means_ID: FloatArray,
    query_D: FloatArray,
    prior_I: Float64,
    unseen: Sequence[int],
    history: Sequence[int | str],
    p: Parameters,
) -> Float64:
    """Return log p(v | history) of each item, given its mean. `unseen` are the items without training samples."""
    means_ID = means_ID.astype(np.float64)
    odds_I = np.exp(p.tau * (means_ID @ query_D - (means_ID**2).sum(axis=1) / 2)) * prior_I**p.prior_weight
    for item in range(len(odds_I)):
        odds_I[item] *= p.repeat if item in history else 1
        odds_I[item] *= p.unseen if item in unseen else 1
    return np.log(odds_I / odds_I.sum())
