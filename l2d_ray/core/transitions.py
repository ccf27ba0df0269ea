"""Transitions from each of the last items of a history, the nearest with the most weight: counts, and no training.

With item i of age 0 for the last item, and c(i, v) the weighted number of training samples of v shortly after i,

    p(v | history) = sum over i of A^age(i) (c(i, v) + S p(v)) / (c(i) + S) / sum of the weights

is a mixture of Markov chains that skip items, each smoothed by the popularity p(v). A sample of v weighs B^(lag - 1),
with lag 1 for the item just before v.

The counts by lag are whole numbers, and they add up over users. Each shard of an index counts its targets only.

Sources: mixtures of the transitions from several last states are Raftery's model (1985). The smoothing by a prior is
Dirichlet smoothing (Zhai and Lafferty, 2004).

Shapes: I items, V targets of a shard, P pairs of an item and a target, L lags, A ages, H interactions, U histories.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from l2d_ray.core.arrays import Float64, IntArray, Integers
from l2d_ray.core.query import History

PLACES = 10
"""Items before a target that count as its predecessors; last items of a history that predict."""
UNKNOWN, NO_ITEM = -1, -2


class Interactions(Protocol):
    """Training interactions of some users, one user after the other."""

    @property
    def items(self) -> NDArray[np.int32]:
        """[H] item indices, each user's in time order."""
        ...

    @property
    def positions(self) -> IntArray:
        """[H] number of the user's items before each interaction."""
        ...

    @property
    def is_target(self) -> NDArray[np.bool_]:
        """[H] whether the interaction is the target of a training sample."""
        ...


class Mixture(NamedTuple):
    """The parameters of p(v | history) that are no part of the counts. The defaults suit MovieLens-100k."""

    age_decay: float = 0.8
    """A: factor of the weight for each item after the one that predicts."""
    smoothing: float = 20.0
    """S: weight of the popularity, in training samples."""


@dataclass(frozen=True)
class TransitionCounts:
    """Numbers of training samples of some targets, by an item at most `PLACES` before, and by the lag."""

    targets_V: IntArray
    """Item index of each target, ascending."""
    starts_I: IntArray
    """[I + 1]: the pairs of item i are those from starts[i] to starts[i + 1] - 1."""
    places_P: NDArray[np.int32]
    """Place of each pair's target in `targets_V`, ascending for each item."""
    counts_LP: NDArray[np.unsignedinteger[Any]]
    """Samples of each pair, by lag."""
    totals_LI: IntArray
    """Samples after each item, by lag, of all targets of all shards."""
    samples_V: IntArray
    """Samples of each target."""
    samples: int
    """Samples of all targets of all shards."""

    @property
    def num_items(self) -> int:
        """Number of items that a target may follow."""
        return self.starts_I.size - 1

    @property
    def items_P(self) -> IntArray:
        """The item of each pair."""
        return np.repeat(np.arange(self.num_items), np.diff(self.starts_I))

    @classmethod
    def count(cls, parts: Iterable[Interactions], num_items: int, targets_V: IntArray) -> "TransitionCounts":
        """Count the pairs of an item and one of these targets later in the same history."""
        place_I = np.full(num_items, -1, np.int64)
        place_I[targets_V] = np.arange(targets_V.size)
        totals_LI, samples_I = np.zeros((PLACES, num_items), np.int64), np.zeros(num_items, np.int64)
        codes = [np.empty(0, np.int64)]  # of pair and lag
        for part in parts:
            targets_N = np.flatnonzero(part.is_target)
            positions_N = part.positions[targets_N]
            np.add.at(samples_I, part.items[targets_N], 1)
            for lag in range(1, PLACES + 1):
                later_N = targets_N[positions_N >= lag]
                items_N, places_N = part.items[later_N - lag].astype(np.int64), place_I[part.items[later_N]]
                np.add.at(totals_LI[lag - 1], items_N, 1)
                pairs_N = (items_N * targets_V.size + places_N)[places_N >= 0]
                codes.append(pairs_N * PLACES + lag - 1)
        codes_N, counts_N = np.unique(np.concatenate(codes), return_counts=True)
        pairs_P, pair_N = np.unique(codes_N // PLACES, return_inverse=True)
        counts_LP = np.zeros((PLACES, pairs_P.size), np.min_scalar_type(counts_N.max(initial=0)))
        counts_LP[codes_N % PLACES, pair_N] = counts_N
        starts_I = np.searchsorted(pairs_P, np.arange(num_items + 1) * targets_V.size)
        places_P = (pairs_P % max(targets_V.size, 1)).astype(np.int32)
        samples = int(samples_I.sum())
        return cls(targets_V, starts_I, places_P, counts_LP, totals_LI, samples_I[targets_V], samples)

    def plus(self, older: "TransitionCounts") -> "TransitionCounts":
        """Return these counts and those of an older dataset, which may lack the last items and targets."""
        width, counted = max(self.targets_V.size, 1), (older, self)
        codes = [part.items_P * width + part.places_P for part in counted]
        pairs_P = np.union1d(*codes)
        largest = sum(int(part.counts_LP.max(initial=0)) for part in counted)
        counts_LP = np.zeros((PLACES, pairs_P.size), np.min_scalar_type(largest))
        for part, codes_P in zip(counted, codes, strict=True):
            counts_LP[:, np.searchsorted(pairs_P, codes_P)] += part.counts_LP
        totals_LI, samples_V = self.totals_LI.copy(), self.samples_V.copy()
        totals_LI[:, : older.num_items] += older.totals_LI
        samples_V[: older.targets_V.size] += older.samples_V
        return TransitionCounts(
            self.targets_V,
            np.searchsorted(pairs_P, np.arange(self.num_items + 1) * width),
            (pairs_P % width).astype(np.int32),
            counts_LP.astype(np.min_scalar_type(counts_LP.max(initial=0))),
            totals_LI,
            samples_V,
            self.samples + older.samples,
        )

    @classmethod
    def join(cls, shards: "Sequence[TransitionCounts]", items: Integers) -> "TransitionCounts":
        """Return the counts of the targets of all shards, with the pairs of these items only."""
        wanted_I = np.zeros(shards[0].num_items, np.bool_)
        wanted_I[items] = True
        targets_V = np.sort(np.concatenate([shard.targets_V for shard in shards]))
        parts = []
        for shard in shards:
            items_P = shard.items_P
            kept_P = wanted_I[items_P]
            places_P = np.searchsorted(targets_V, shard.targets_V)[shard.places_P[kept_P]]
            parts.append((items_P[kept_P], places_P, shard.counts_LP[:, kept_P]))
        items_P, places_P, counts_LP = (np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
        order_P = np.lexsort((places_P, items_P))
        starts_I = np.searchsorted(items_P[order_P], np.arange(wanted_I.size + 1))
        samples_V = np.empty(targets_V.size, np.int64)
        for shard in shards:
            samples_V[np.searchsorted(targets_V, shard.targets_V)] = shard.samples_V
        return cls(
            targets_V,
            starts_I,
            places_P[order_P].astype(np.int32),
            counts_LP[:, order_P],
            shards[0].totals_LI,
            samples_V,
            shards[0].samples,
        )

    def weigh(self, lag_decay: float, floor: float = 0.0) -> "Transitions":
        """Return the transitions with weight `lag_decay` (B) for each further place.

        `floor` is added to the number of training samples of every item, so that p(v) is above 0.
        """
        shape = self.num_items, self.targets_V.size
        counts_P = _weighted_sum(self.counts_LP, lag_decay)
        samples = self.samples + floor * self.num_items
        popularity_V = (self.samples_V.astype(np.float64) + floor) / (samples or 1)
        return Transitions(
            sparse.csr_array((counts_P, self.places_P, self.starts_I), shape),
            _weighted_sum(self.totals_LI, lag_decay),
            popularity_V,
        )


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


def _weighted_sum(counts_LN: Integers, decay: float) -> Float64:
    """Return the sum over lags, lag after lag, so that an element does not depend on the others."""
    sums_N = np.zeros(counts_LN.shape[1])
    for lag, counts_N in enumerate(counts_LN):
        sums_N += decay**lag * counts_N
    return sums_N
