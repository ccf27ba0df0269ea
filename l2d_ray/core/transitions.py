"""Transitions from each of the last items of a history, the nearest with the most weight: counts, and no training.

With item i of age 0 for the last item, and c(i, v) the weighted number of training samples of v shortly after i,

    p(v | history) = sum over i of A^age(i) (c(i, v) + S p(v)) / (c(i) + S) / sum of the weights

is a mixture of Markov chains that skip items, each smoothed by the popularity p(v). A sample of v weighs B^(lag - 1),
with lag 1 for the item just before v.

`core.transition_counts` has the counts.

Sources: mixtures of the transitions from several last states are Raftery's model (1985). The smoothing by a prior is
Dirichlet smoothing (Zhai and Lafferty, 2004).

Shapes: I items, V targets of a shard, A ages, U histories.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.query import History

PLACES = 10
"""Items before a target that count as its predecessors; last items of a history that predict."""
UNKNOWN, NO_ITEM = -1, -2


class Mixture(NamedTuple):
    """The parameters of p(v | history) that are no part of the counts. The defaults suit MovieLens-100k."""

    age_decay: float = 0.8
    """A: factor of the weight for each item after the one that predicts."""
    smoothing: float = 20.0
    """S: weight of the popularity, in training samples."""


@dataclass(frozen=True)
class Transitions:
    """The probability of each target after a history."""

    counts_IV: sparse.csr_array
    """c(i, v): training samples of v after i, each with the weight of its lag."""
    totals_I: Float64
    """c(i): the sum over all targets of all shards."""
    popularity_V: Float64
    """p(v): the share of training samples whose target is v."""

    def probabilities(self, history: History, mixture: Mixture) -> Float64:
        """Return p(v | history) of each target. After a title that the catalogue does not know it is p(v)."""
        items_UA = last_items([history])
        ((weights_A,), (of_popularity,)) = self.weights(items_UA, mixture)
        probabilities_V: Float64 = of_popularity * self.popularity_V
        for item, weight in zip(items_UA[0].tolist(), weights_A.tolist(), strict=True):
            if weight:
                pairs = slice(*self.counts_IV.indptr[item : item + 2])
                probabilities_V[self.counts_IV.indices[pairs]] += weight * self.counts_IV.data[pairs]
        return probabilities_V

    def probabilities_after(self, items_UA: IntArray, mixture: Mixture) -> Float64:
        """Return the same [U, V] after many histories, given by their `last_items`."""
        weights_UA, of_popularity_U = self.weights(items_UA, mixture)
        starts_U = np.arange(len(items_UA) + 1) * PLACES
        shape = len(items_UA), self.totals_I.size
        weights_UI = sparse.csr_array((weights_UA.ravel(), np.maximum(items_UA, 0).ravel(), starts_U), shape)
        probabilities_UV: Float64 = (weights_UI @ self.counts_IV).toarray()
        probabilities_UV += of_popularity_U[:, None] * self.popularity_V
        return probabilities_UV

    def weights(self, items_UA: IntArray, mixture: Mixture) -> tuple[Float64, Float64]:
        """Return the weight [U, A] of a training sample after each of the last items, and that [U] of p(v)."""
        known_UA = items_UA >= 0
        weights_UA = np.where(items_UA != NO_ITEM, mixture.age_decay ** np.arange(PLACES), 0)
        weights_UA /= weights_UA.sum(axis=1, keepdims=True)
        weights_UA /= np.where(known_UA, self.totals_I[np.maximum(items_UA, 0)], 0) + mixture.smoothing
        return np.where(known_UA, weights_UA, 0), mixture.smoothing * weights_UA.sum(axis=1)


def last_items(histories: Sequence[History]) -> IntArray:
    """Return the last `PLACES` items [U, A] of each history, the last one first.

    UNKNOWN stands for a title that the catalogue does not know, NO_ITEM for the time before the first item.
    """
    items_UA = np.full((len(histories), PLACES), NO_ITEM, np.int64)
    for user, history in enumerate(histories):
        last = [UNKNOWN if isinstance(item, str) else int(item) for item in history[-PLACES:]]
        items_UA[user, : len(last)] = last[::-1]
    return items_UA
