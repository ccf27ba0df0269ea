"""Recall and NDCG of ranked lists with one target each, their confidence intervals, and calibration.

Ranks are over the full catalogue. Shapes: U samples, K results, V values per sample, G users, N predictions, B bins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, IntArray

NOT_RANKED = np.iinfo(np.int64).max
"""Rank of a target that is not in its list."""


def target_ranks(lists_U: Sequence[NDArray[np.integer]], targets_U: NDArray[np.integer]) -> IntArray:
    """Return the rank [U] of each target in its list of items, from 0; NOT_RANKED if it is not in the list."""
    places = [np.flatnonzero(items_K == target) for items_K, target in zip(lists_U, targets_U, strict=True)]
    return np.array([found[0] if found.size else NOT_RANKED for found in places], np.int64)


def recall(ranks_U: IntArray, k: int) -> Float64:
    """Return Recall@K [U] of each sample: 1 if the target is among the first K, else 0. The metric is their mean."""
    return (ranks_U < k).astype(np.float64)


def ndcg(ranks_U: IntArray, k: int) -> Float64:
    """Return NDCG@K [U] of each sample: 1 / log2(rank + 2) if the target is among the first K, else 0.

    With one relevant item the ideal gain is 1 (Järvelin and Kekäläinen, 2002).
    """
    found_U = ranks_U < k
    gains_U: Float64 = np.where(found_U, 1 / np.log2(np.where(found_U, ranks_U, 0) + 2.0), 0.0)
    return gains_U


def bootstrap_intervals(
    values_UV: Float64, users_U: NDArray[np.integer], resamples: int = 1000, seed: int = 0
) -> Float64:
    """Return the 95% bootstrap interval [V, 2] of each value's mean, resampling *users*; nan without samples.

    The samples of one user are correlated, so resampling single samples would give intervals that are too narrow.
    Percentile method: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13. Clusters: Field and Welsh,
    2007.
    """
    if not len(values_UV):
        return np.full((values_UV.shape[1], 2), np.nan)
    _, user_U = np.unique(users_U, return_inverse=True)
    counts_G = np.bincount(user_U)
    sums_GV = np.stack([np.bincount(user_U, weights=values_U) for values_U in values_UV.T], axis=1)
    random = np.random.default_rng(seed)
    drawn = (random.integers(0, counts_G.size, counts_G.size) for _ in range(resamples))
    means = [sums_GV[draw].sum(axis=0) / counts_G[draw].sum() for draw in drawn]
    bounds_V2: Float64 = np.percentile(means, [2.5, 97.5], axis=0).T
    return bounds_V2


@dataclass(frozen=True)
class Reliability:
    """Predicted probabilities against the shares of predictions that came true, in B bins of equal size."""

    predicted_B: Float64
    """Mean probability of each bin, ascending."""
    observed_B: Float64
    """Share of each bin that came true."""
    counts_B: IntArray
    """Predictions of each bin."""

    @classmethod
    def of(cls, probabilities_N: Float64, came_true_N: NDArray[np.bool_], bins: int = 10) -> Self:
        """Sort predictions by their probability, and divide them into bins; into fewer if there are fewer."""
        order_N = np.argsort(probabilities_N, kind="stable")
        parts = [part for part in np.array_split(order_N, bins) if part.size]
        predicted, observed = ([values_N[part].mean() for part in parts] for values_N in (probabilities_N, came_true_N))
        return cls(np.array(predicted), np.array(observed), np.array([part.size for part in parts], np.int64))

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over predictions of the difference in their bin.

        Source: Naeini, Cooper and Hauskrecht (2015); bins of equal size are those of Nguyen and O'Connor (2015).
        """
        return float(self.counts_B @ np.abs(self.predicted_B - self.observed_B) / max(self.counts_B.sum(), 1))

    @property
    def means(self) -> tuple[float, float]:
        """Mean probability of all predictions, and the share of them that came true."""
        shares_B = self.counts_B / max(self.counts_B.sum(), 1)
        return float(shares_B @ self.predicted_B), float(shares_B @ self.observed_B)
