"""Recall and NDCG of ranked lists with one target each, over the full catalogue, and how sure they are.

Shapes: U samples, K results, I items.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NOT_RANKED = np.iinfo(np.int64).max
"""The rank of a target that is not in its list."""


def target_ranks(lists_U: Sequence[NDArray[np.integer]], targets_U: NDArray[np.integer]) -> IntArray:
    """Return the rank [U] of each target in its list of items, from 0; NOT_RANKED if it is not in the list."""
    places = [np.flatnonzero(items_K == target) for items_K, target in zip(lists_U, targets_U, strict=True)]
    return np.array([found[0] if found.size else NOT_RANKED for found in places], np.int64)


def recall(ranks_U: IntArray, k: int) -> FloatArray:
    """[U] Recall@K of each sample: 1 where the target is among the first K. Its mean is the metric."""
    return (ranks_U < k).astype(np.float64)


def ndcg(ranks_U: IntArray, k: int) -> FloatArray:
    """[U] NDCG@K of each sample: 1 / log2(rank + 2) where the target is among the first K, else 0.

    With one relevant item the ideal gain is 1 (Järvelin and Kekäläinen, 2002).
    """
    found_U = ranks_U < k
    gains_U: FloatArray = np.where(found_U, 1 / np.log2(np.where(found_U, ranks_U, 0) + 2.0), 0.0)
    return gains_U


def bootstrap_intervals(
    values_UV: FloatArray, users_U: NDArray[np.integer], resamples: int = 1000, seed: int = 0
) -> FloatArray:
    """[V, 2] the 95% percentile intervals of the means of V values of U samples, resampling *users*.

    The samples of one user resemble each other; to resample them one by one would claim too much. nan where there are
    no samples. Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; Field and Welsh (2007) for
    clusters.
    """
    if not len(values_UV):
        return np.full((values_UV.shape[1], 2), np.nan)
    _, user_U = np.unique(users_U, return_inverse=True)
    counts_G = np.bincount(user_U)
    sums_GV = np.stack([np.bincount(user_U, weights=values_U) for values_U in values_UV.T], axis=1)
    random = np.random.default_rng(seed)
    drawn = (random.integers(0, counts_G.size, counts_G.size) for _ in range(resamples))
    means = [sums_GV[draw].sum(axis=0) / counts_G[draw].sum() for draw in drawn]
    bounds_V2: FloatArray = np.percentile(means, [2.5, 97.5], axis=0).T
    return bounds_V2
