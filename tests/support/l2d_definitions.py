"""The definitions of L2D-G and L2D-L on a whole memory: what the search over shards must equal."""

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import FloatArray, IntArray
from l2d_ray.core.decoding import ScoredItems, aggregate, best_items, nearest, scores_of, squared_distances


def l2d_global(query_D: FloatArray, means_ID: FloatArray, items_I: IntArray, k: int) -> ScoredItems:
    """Return the K items whose means are nearest."""
    return best_items([ScoredItems(items_I, scores_of(squared_distances(query_D, means_ID)))], k)


def l2d_local(
    query_D: FloatArray, rows_MD: FloatArray, sample_ids_M: IntArray, items_M: NDArray, top_m: int, k: int
) -> ScoredItems:
    """Return the K items whose means over the M nearest rows are nearest."""
    near = nearest(squared_distances(query_D, rows_MD), sample_ids_M, np.arange(len(rows_MD)), top_m)
    return best_items([aggregate(query_D, rows_MD[near.rows_M], items_M[near.rows_M])], k)
