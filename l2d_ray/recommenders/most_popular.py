"""The items with the most training samples, for everybody: the floor that any recommender must clear."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import ScoredItems, best_items
from l2d_ray.recommenders.contract import EXCLUDE_SEEN, Filters, as_arrays


@dataclass(frozen=True)
class MostPopular:
    """Scores are numbers of training samples, and equal ones are ordered by item index."""

    ranking: ScoredItems

    @classmethod
    def fit(cls, targets: NDArray[np.integer]) -> "MostPopular":
        """From the targets of the training samples."""
        items_I, counts_I = np.unique(targets, return_counts=True)
        return cls(best_items([ScoredItems(items_I.astype(np.int64), counts_I.astype(np.float64))], items_I.size))

    def recommend(
        self, histories: Sequence[NDArray[np.int32]], k: int, filters: Filters = EXCLUDE_SEEN
    ) -> tuple[IntArray, Float64]:
        """As in `Recommender`."""
        return as_arrays([self.ranking.permitted(out, filters.allow) for out in filters.excluded(histories)], k)
