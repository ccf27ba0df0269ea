"""L2D: one forward pass and a nearest-neighbour search."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, FloatArray, IntArray
from l2d_ray.core.query import Query
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.recommenders.contract import EXCLUDE_SEEN, Filters, as_arrays


@dataclass(frozen=True)
class L2DRecommender:
    """L2D-G ("global") or L2D-L ("local") over an index."""

    encode: Callable[[Sequence[NDArray[np.int32]]], FloatArray]
    """Histories to states [U, D], as the rows of the index were encoded."""
    index: ShardedIndex
    aggregation: str = "global"
    top_m: int = 200

    def recommend(
        self, histories: Sequence[NDArray[np.int32]], k: int, filters: Filters = EXCLUDE_SEEN
    ) -> tuple[IntArray, Float64]:
        """As in `Recommender`; scores are 1 / distance, of L2D-G with what the item's prior adds to it."""
        return self.decode(self.encode(histories), histories, k, filters)

    def decode(
        self, states_UD: FloatArray, histories: Sequence[NDArray[np.int32]], k: int, filters: Filters = EXCLUDE_SEEN
    ) -> tuple[IntArray, Float64]:
        """`recommend` for histories whose states are known."""
        excluded = filters.excluded(histories)
        queries = [
            Query(history, k, exclude, filters.allow, self.aggregation, self.top_m)
            for history, exclude in zip(histories, excluded, strict=True)
        ]
        return as_arrays(self.index.recommend(states_UD, queries), k)
