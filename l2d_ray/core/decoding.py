"""Matching a history's state with the memory: L2D-G and L2D-L, exact, whole or in shards.

L2D-G scores an item by the distance of the history's state to the mean of the item's rows. L2D-L takes the mean over
those of the item's rows only that are among the M nearest to the history. Both score S = 1 / distance.

All rows of an item live in one shard, so that L2D-L over shards takes two short hops and gives the very numbers of the
unsharded definition (`local_neighbours` on everything):

1. every shard finds its own M nearest rows (`nearest`); of these, `global_cut` takes the M-th over all shards;
2. every shard keeps its rows up to the cut (`Neighbours.up_to`) and averages them per item (`aggregate`);
   `best_items` merges the lists.

Distances are float64 sums over one row each, and rows are ordered by (distance, sample id), items by (score, index):
no number depends on which other rows are in the same shard, so that ties fall the same way however rows are dealt.

Source: L2D (arXiv 2509.11524), sections on aggregation and matching. Shapes: M rows, D dimension, I items, K results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating]
Float64 = NDArray[np.float64]
IntArray = NDArray[np.int64]
Aggregation = Literal["global", "local"]
"""L2D-G or L2D-L."""


@dataclass(frozen=True)
class Neighbours:
    """Rows near one query, nearest first; of equally near ones the smaller sample id is first."""

    distances_M: Float64
    """Squared distances."""
    sample_ids_M: IntArray
    rows_M: IntArray
    """Which rows of their shard they are."""

    def keep(self, which_M: NDArray[np.bool_]) -> "Neighbours":
        """Some of them, in the same order."""
        return Neighbours(self.distances_M[which_M], self.sample_ids_M[which_M], self.rows_M[which_M])

    def first(self, count: int) -> "Neighbours":
        """The nearest of them."""
        return Neighbours(self.distances_M[:count], self.sample_ids_M[:count], self.rows_M[:count])

    def up_to(self, cut: "Cut") -> "Neighbours":
        """Those that are not beyond the cut."""
        distance, sample_id = cut
        at_cut_M = (self.distances_M == distance) & (self.sample_ids_M <= sample_id)
        return self.keep((self.distances_M < distance) | at_cut_M)


Cut = tuple[float, int]
"""Squared distance and sample id of the last row that counts."""

EVERYTHING: Cut = (np.inf, np.iinfo(np.int64).max)


@dataclass(frozen=True)
class ScoredItems:
    """Items and their scores, each item once."""

    items_I: IntArray
    scores_I: Float64

    def __len__(self) -> int:
        return self.items_I.size

    def permitted(self, exclude: IntArray, allow: IntArray | None = None) -> "ScoredItems":
        """The items that are not excluded, and are allowed where `allow` is given, in the same order."""
        keep_I = ~np.isin(self.items_I, exclude)
        if allow is not None:
            keep_I &= np.isin(self.items_I, allow)
        return ScoredItems(self.items_I[keep_I], self.scores_I[keep_I])


NO_ITEMS = ScoredItems(np.empty(0, np.int64), np.empty(0))


def squared_distances(query_D: FloatArray, rows_MD: FloatArray) -> Float64:
    """[M] squared L2 distances, each summed over its own row in float64."""
    differences_MD = rows_MD.astype(np.float64, order="C") - query_D.astype(np.float64)
    distances_M: Float64 = np.square(differences_MD, out=differences_MD).sum(axis=1)
    return distances_M


def scores_of(squared_distances_I: Float64) -> Float64:
    """S = 1 / distance; inf for identical vectors."""
    with np.errstate(divide="ignore"):
        scores_I: Float64 = 1 / np.sqrt(squared_distances_I)
    return scores_I


def nearest(distances_M: Float64, sample_ids_M: IntArray, rows_M: IntArray, count: int) -> Neighbours:
    """The first `count` of these rows."""
    order_M = np.lexsort((sample_ids_M, distances_M))[:count]
    return Neighbours(distances_M[order_M], sample_ids_M[order_M], rows_M[order_M])


def global_cut(shards: Sequence[Neighbours], count: int) -> Cut:
    """The `count`-th row over all shards, each of which gives its own first `count`; EVERYTHING if there are fewer."""
    distances_M = np.concatenate([shard.distances_M for shard in shards])
    sample_ids_M = np.concatenate([shard.sample_ids_M for shard in shards])
    if distances_M.size < count:
        return EVERYTHING
    last = np.lexsort((sample_ids_M, distances_M))[count - 1]
    return float(distances_M[last]), int(sample_ids_M[last])


def aggregate(query_D: FloatArray, rows_MD: FloatArray, items_M: NDArray[np.integer]) -> ScoredItems:
    """The items of these rows, scored by the distance of the query to the mean of each one's rows (L2D-L)."""
    if not items_M.size:
        return NO_ITEMS
    order_M = np.argsort(items_M, kind="stable")
    items_I, starts_I, counts_I = np.unique(items_M[order_M], return_index=True, return_counts=True)
    means_ID = np.add.reduceat(rows_MD[order_M].astype(np.float64), starts_I, axis=0) / counts_I[:, None]
    return ScoredItems(items_I.astype(np.int64), scores_of(squared_distances(query_D, means_ID)))


def best_items(shards: Sequence[ScoredItems], k: int) -> ScoredItems:
    """The K best of all; of equal scores the smaller item index is first."""
    items_I = np.concatenate([NO_ITEMS.items_I, *(shard.items_I for shard in shards)])
    scores_I = np.concatenate([NO_ITEMS.scores_I, *(shard.scores_I for shard in shards)])
    order_K = np.lexsort((items_I, -scores_I))[:k]
    return ScoredItems(items_I[order_K], scores_I[order_K])


def completed(found: ScoredItems, more: ScoredItems, k: int, exclude: IntArray, allow: IntArray | None) -> ScoredItems:
    """The permitted items of a list, filled up with the permitted items of another where they are fewer than K.

    An item that is filled in keeps its score, but not above the last of the whole first list: scores never rise along
    a list, and no filter changes one.
    """
    first, filling = found.permitted(exclude, allow), more.permitted(np.union1d(exclude, found.items_I), allow)
    ceiling = found.scores_I[-1] if len(found) else np.inf
    items_I = np.concatenate([first.items_I, filling.items_I])
    scores_I = np.concatenate([first.scores_I, np.minimum(filling.scores_I, ceiling)])
    return ScoredItems(items_I[:k], scores_I[:k])


def global_neighbours(query_D: FloatArray, centroids_ID: FloatArray, items_I: IntArray, k: int) -> ScoredItems:
    """L2D-G by its definition: the K items whose means are nearest."""
    return best_items([ScoredItems(items_I, scores_of(squared_distances(query_D, centroids_ID)))], k)


def local_neighbours(
    query_D: FloatArray, rows_MD: FloatArray, sample_ids_M: IntArray, items_M: IntArray, top_m: int, k: int
) -> ScoredItems:
    """L2D-L by its definition, on the whole memory: aggregate the M nearest rows."""
    everything = nearest(squared_distances(query_D, rows_MD), sample_ids_M, np.arange(len(rows_MD)), top_m)
    return best_items([aggregate(query_D, rows_MD[everything.rows_M], items_M[everything.rows_M])], k)
