"""The mathematics of L2D-G and L2D-L: ranking rows and items, exactly, over any number of shards.

L2D-G scores an item by the distance from the query to the mean of the item's rows. L2D-L takes the mean over only
those of the item's rows that are among the M nearest to the query. Both score S = 1 / distance.

All rows of an item live in one shard. L2D-L over shards therefore takes two short rounds and gives the same numbers as
the definition on the whole memory:

1. Every shard finds its M nearest rows (`nearest`). `last_row` finds the M-th nearest over all shards.
2. Every shard keeps its rows up to that one (`Neighbours.up_to`) and averages them per item (`aggregate`).
   `best_items` merges the lists.

Every distance is a float64 sum over one row. Rows are ordered by (distance, sample id), items by (score, index). No
number depends on the other rows of a shard, so ties are broken in the same way under any sharding.

Source: L2D (arXiv 2509.11524), sections on aggregation and matching. Shapes: M rows, D dimension, I items, K results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, FloatArray, IntArray


class LastRow(NamedTuple):
    """The farthest row that still counts as one of the M nearest."""

    distance: float
    """Squared distance."""
    sample_id: int


ALL_ROWS = LastRow(np.inf, np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Neighbours:
    """Rows near one query, nearest first; of equally near rows the smaller sample id comes first."""

    distances_M: Float64
    """Squared distances."""
    sample_ids_M: IntArray
    rows_M: IntArray
    """Row numbers in the shard."""

    def keep(self, which_M: NDArray[np.bool_]) -> "Neighbours":
        """Return the selected rows in the same order."""
        return Neighbours(self.distances_M[which_M], self.sample_ids_M[which_M], self.rows_M[which_M])

    def first(self, count: int) -> "Neighbours":
        """Return the nearest `count` rows."""
        return Neighbours(self.distances_M[:count], self.sample_ids_M[:count], self.rows_M[:count])

    def up_to(self, last: LastRow) -> "Neighbours":
        """Return the rows that are not beyond `last`."""
        tied_M = (self.distances_M == last.distance) & (self.sample_ids_M <= last.sample_id)
        return self.keep((self.distances_M < last.distance) | tied_M)


@dataclass(frozen=True)
class ScoredItems:
    """Items and their scores, each item once."""

    items_I: IntArray
    scores_I: Float64

    def __len__(self) -> int:
        return self.items_I.size

    def first(self, count: int) -> "ScoredItems":
        """Return the first `count` items."""
        return ScoredItems(self.items_I[:count], self.scores_I[:count])

    def permitted(self, exclude: IntArray, allow: IntArray | None = None) -> "ScoredItems":
        """Return the items that are not excluded and, where `allow` is given, are in it. The order stays."""
        keep_I = ~np.isin(self.items_I, exclude)
        if allow is not None:
            keep_I &= np.isin(self.items_I, allow)
        return ScoredItems(self.items_I[keep_I], self.scores_I[keep_I])


NO_ITEMS = ScoredItems(np.empty(0, np.int64), np.empty(0))


def squared_distances(query_D: FloatArray, rows_MD: FloatArray) -> Float64:
    """Return the squared L2 distances [M], each summed over its row in float64."""
    differences_MD = rows_MD.astype(np.float64, order="C") - query_D.astype(np.float64)
    distances_M: Float64 = np.square(differences_MD, out=differences_MD).sum(axis=1)
    return distances_M


def scores_of(squared_distances_I: Float64) -> Float64:
    """Return S = 1 / distance; inf for identical vectors."""
    with np.errstate(divide="ignore"):
        scores_I: Float64 = 1 / np.sqrt(squared_distances_I)
    return scores_I


def nearest(distances_M: Float64, sample_ids_M: IntArray, rows_M: IntArray, count: int) -> Neighbours:
    """Return the `count` nearest of these rows."""
    order_M = np.lexsort((sample_ids_M, distances_M))[:count]
    return Neighbours(distances_M[order_M], sample_ids_M[order_M], rows_M[order_M])


def last_row(shards: Sequence[Neighbours], count: int) -> LastRow:
    """Return the `count`-th nearest row over all shards, given the nearest `count` of each.

    Returns ALL_ROWS if the shards have fewer rows than `count`.
    """
    distances_M = np.concatenate([shard.distances_M for shard in shards])
    sample_ids_M = np.concatenate([shard.sample_ids_M for shard in shards])
    if distances_M.size < count:
        return ALL_ROWS
    last = np.lexsort((sample_ids_M, distances_M))[count - 1]
    return LastRow(float(distances_M[last]), int(sample_ids_M[last]))


def aggregate(query_D: FloatArray, rows_MD: FloatArray, items_M: NDArray[np.integer]) -> ScoredItems:
    """Return the items of these rows, each scored by the distance from the query to the mean of its rows (L2D-L)."""
    if not items_M.size:
        return NO_ITEMS
    order_M = np.argsort(items_M, kind="stable")
    items_I, starts_I, counts_I = np.unique(items_M[order_M], return_index=True, return_counts=True)
    means_ID = np.add.reduceat(rows_MD[order_M].astype(np.float64), starts_I, axis=0) / counts_I[:, None]
    return ScoredItems(items_I.astype(np.int64), scores_of(squared_distances(query_D, means_ID)))


def best_items(shards: Sequence[ScoredItems], k: int) -> ScoredItems:
    """Return the K best items of all lists; of equal scores the smaller item index comes first."""
    items_I = np.concatenate([NO_ITEMS.items_I, *(shard.items_I for shard in shards)])
    scores_I = np.concatenate([NO_ITEMS.scores_I, *(shard.scores_I for shard in shards)])
    order_K = np.lexsort((items_I, -scores_I))[:k]
    return ScoredItems(items_I[order_K], scores_I[order_K])


def first_items(items: ScoredItems, k: int) -> ScoredItems:
    """Return the K best of items in any order. Sorts those of the best scores only."""
    if len(items) > k:
        kept_I = items.scores_I >= np.partition(items.scores_I, -k)[-k]
        items = ScoredItems(items.items_I[kept_I], items.scores_I[kept_I])
    return best_items([items], k)


def best_of_all(scores_I: FloatArray, k: int, exclude: IntArray, allow: IntArray | None = None) -> ScoredItems:
    """Return the K best permitted items, given the score of every item; -inf takes an item out.

    Of equal scores the smaller item index comes first. The items of a filter need not exist.
    """
    permitted_I = scores_I > -np.inf
    permitted_I[exclude[(exclude >= 0) & (exclude < scores_I.size)]] = False
    if allow is not None:
        permitted_I &= np.isin(np.arange(scores_I.size), allow)
    items_I = np.flatnonzero(permitted_I)
    return first_items(ScoredItems(items_I.astype(np.int64), scores_I[items_I].astype(np.float64)), k)


def completed(found: ScoredItems, more: ScoredItems, k: int, exclude: IntArray, allow: IntArray | None) -> ScoredItems:
    """Return the first K permitted items of `found`, followed by those of `more` where they are fewer than K.

    An item of `more` keeps its score, but never exceeds the last score of the whole list `found`. So scores never rise
    along the result, and no filter changes a score.
    """
    first, filling = found.permitted(exclude, allow), more.permitted(np.union1d(exclude, found.items_I), allow)
    ceiling = found.scores_I[-1] if len(found) else np.inf
    items_I = np.concatenate([first.items_I, filling.items_I])
    scores_I = np.concatenate([first.scores_I, np.minimum(filling.scores_I, ceiling)])
    return ScoredItems(items_I, scores_I).first(k)
