"""Sums over memory rows: item sums, from which item means follow, and the moments from which a space is fitted.

Everything here adds up: the sums of two memories are the sums of both together. So shards and units are summed apart
and in any order, and a memory grows without being read again. Source: L2D (arXiv 2509.11524), global aggregation.

Shapes: M memory rows, D hidden size, I items.
"""

from dataclasses import dataclass, replace

import numpy as np

from l2d_ray.core.arrays import Amounts, Float64, FloatArray, IntArray, Integers


def item_sums(states_MD: FloatArray, items_M: Integers, num_items: int) -> tuple[Float64, IntArray]:
    """Return sums [I, D] and counts [I] of the states of each item's rows, added in the order of the rows.

    The sum of an item depends on its rows only, never on other rows: shards give the same bits as the whole.
    """
    sums_ID, counts_I = np.zeros((num_items, states_MD.shape[1])), np.zeros(num_items, np.int64)
    add_rows(sums_ID, counts_I, states_MD, items_M)
    return sums_ID, counts_I


def add_rows(
    sums_ID: Float64,
    counts_I: Amounts,
    states_MD: FloatArray,
    items_M: Integers,
    weights_M: Float64 | None = None,
) -> None:
    """Add rows to the sums and counts of their items, in place. A row with a weight counts as much (`core.decay`)."""
    import torch  # here, because importing it takes seconds and a search does not need it

    states_MD = states_MD.astype(np.float64)
    if weights_M is not None:
        states_MD *= weights_M[:, None]
    items, states = torch.from_numpy(items_M.astype(np.int64)), torch.from_numpy(states_MD)
    torch.from_numpy(sums_ID).index_add_(0, items, states)
    np.add.at(counts_I, items_M, 1 if weights_M is None else weights_M)


@dataclass(frozen=True)
class ItemSums:
    """Sums of the rows of some items, from which their means are estimated."""

    items_I: Integers
    """Ascending."""
    counts_I: Amounts
    """Number of rows, or the sum of their weights, above 0."""
    sums_ID: Float64
    """Sum of the rows, each times its weight."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of memory rows, and the second moments of item means, in float64.

    A float64 sum of 1e9 squares loses no precision that matters.
    """

    rows: int
    items: int
    """Items with at least one row."""
    sum_D: Float64
    outer_DD: Float64
    """Sum over rows of h h^T."""
    item_outer_DD: Float64
    """Sum over items of n_v h_v h_v^T, with h_v the mean of the item's n_v rows."""

    @classmethod
    def zero(cls, dimension: int) -> "Moments":
        """Return the moments of no rows."""
        square = np.zeros((dimension, dimension))
        return cls(0, 0, np.zeros(dimension), square, square)

    @classmethod
    def of_rows(cls, states_MD: FloatArray) -> "Moments":
        """Return the moments of rows, without those of their items (`of_items`)."""
        states_MD = states_MD.astype(np.float64)
        dimension = states_MD.shape[1]
        outer_DD = states_MD.T @ states_MD
        return cls(len(states_MD), 0, states_MD.sum(axis=0), outer_DD, np.zeros((dimension, dimension)))

    @classmethod
    def of_items(cls, sums_ID: Float64, counts_I: Integers) -> "Moments":
        """Return the moments of items, without those of their rows (`of_rows`).

        `sums_ID` must contain every row of these items.
        """
        known_I = counts_I > 0
        scaled_ID = sums_ID[known_I] / np.sqrt(counts_I[known_I, None])
        zero = cls.zero(sums_ID.shape[1])
        return cls(0, int(known_I.sum()), zero.sum_D, zero.outer_DD, scaled_ID.T @ scaled_ID)

    def with_rows(self, other: "Moments", sign: int = 1) -> "Moments":
        """Return the moments with the rows of `other` added, or taken out (`sign` -1); those of items stay."""
        return replace(
            self,
            rows=self.rows + sign * other.rows,
            sum_D=self.sum_D + sign * other.sum_D,
            outer_DD=self.outer_DD + sign * other.outer_DD,
        )

    def with_items(self, other: "Moments", sign: int = 1) -> "Moments":
        """Return the moments with the items of `other` added, or taken out (`sign` -1); those of rows stay."""
        items_DD = self.item_outer_DD + sign * other.item_outer_DD
        return replace(self, items=self.items + sign * other.items, item_outer_DD=items_DD)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.rows + other.rows,
            self.items + other.items,
            self.sum_D + other.sum_D,
            self.outer_DD + other.outer_DD,
            self.item_outer_DD + other.item_outer_DD,
        )
