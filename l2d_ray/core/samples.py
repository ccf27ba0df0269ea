"""Ids of samples, their windows, the choice of a share of them, and the shards of items, as functions of integers.

Every choice is a hash or a formula, never a random draw, so that another run, on another machine or on more data, makes
the same choice. The hashes are those of `pandas.util.hash_array`, which are the same on every machine.
"""

import numpy as np
from numpy.typing import NDArray
from pandas.util import hash_array

from l2d_ray.core.arrays import IntArray


def window_starts(positions: IntArray, max_items: int, stride: int) -> IntArray:
    """Return the start of the window `history[start:position]` of the sample at each position.

    The start moves in steps of `stride`, so that windows of long histories have max_items to max_items + stride - 1
    items.
    """
    starts: IntArray = np.maximum(0, (positions - max_items) // stride * stride)
    return starts


def last_window(length: int, max_items: int, stride: int) -> slice:
    """Return the window of a query with a history of `length` items: that of a sample at position `length`."""
    (start,) = window_starts(np.array([length]), max_items, stride)
    return slice(int(start), length)


def sample_ids(user_hashes: IntArray, positions: IntArray) -> IntArray:
    """Return a stable 64-bit id for each (user, position). Among 1e9 samples, 0.03 collisions are expected."""
    position_hashes = hash_array(positions.astype(np.uint64))
    hashes: NDArray[np.uint64] = hash_array(user_hashes.view(np.uint64) ^ position_hashes)
    return hashes.view(np.int64)


def in_fraction(ids: IntArray, fraction: float) -> NDArray[np.bool_]:
    """Return whether each sample belongs to a share of all samples. A smaller share is a subset of a larger one."""
    uniform = (ids.view(np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
    return uniform < fraction


def windows_in_fraction(user_hashes: IntArray, starts: IntArray, fraction: float) -> NDArray[np.bool_]:
    """Return `in_fraction` by window, so that samples of a user whose windows have the same start stay together."""
    return in_fraction(sample_ids(user_hashes, starts), fraction)


def item_shards(item_indices: NDArray[np.int32], num_shards: int) -> IntArray:
    """Return the shard of each item, which holds all rows of the item."""
    hashes: NDArray[np.uint64] = hash_array(item_indices.astype(np.uint64))
    return (hashes % np.uint64(num_shards)).astype(np.int64)
