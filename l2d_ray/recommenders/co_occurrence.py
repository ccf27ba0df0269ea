"""What followed the last item most often: a first-order Markov chain, the simplest model of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import NO_ITEMS, ScoredItems, best_items, completed
from l2d_ray.recommenders.contract import EXCLUDE_SEEN, Filters, as_arrays
from l2d_ray.recommenders.most_popular import MostPopular


@dataclass(frozen=True)
class CoOccurrence:
    """Scores are the share of the last item's training samples that the item followed; then come popular items."""

    followers: dict[int, ScoredItems]
    popular: MostPopular

    @classmethod
    def fit(cls, last_items: NDArray[np.integer], targets: NDArray[np.integer]) -> "CoOccurrence":
        """From the last item and the target of every training sample."""
        pairs, counts = np.unique(np.stack([last_items, targets], axis=1), axis=0, return_counts=True)
        lasts, starts, totals = np.unique(pairs[:, 0], return_index=True, return_counts=True)
        followers = {}
        for last, start, total in zip(lasts.tolist(), starts, totals, strict=True):
            own = slice(start, start + total)
            shares = counts[own] / counts[own].sum()
            followers[last] = best_items([ScoredItems(pairs[own, 1].astype(np.int64), shares)], total)
        ranking = MostPopular.fit(targets).ranking
        shares = ranking.scores_I / max(ranking.scores_I.sum(), 1)
        return cls(followers, MostPopular(ScoredItems(ranking.items_I, shares)))

    def recommend(
        self, histories: Sequence[NDArray[np.int32]], k: int, filters: Filters = EXCLUDE_SEEN
    ) -> tuple[IntArray, Float64]:
        """As in `Recommender`."""
        lists = [
            completed(self.followers.get(int(history[-1]), NO_ITEMS), self.popular.ranking, k, out, filters.allow)
            for history, out in zip(histories, filters.excluded(histories), strict=True)
        ]
        return as_arrays(lists, k)
