"""What identifies a sample, what it sees, whether it is kept, and where its row goes: all functions of integers.

Every choice here is a hash or a formula, never a random draw, so that a job that runs again, elsewhere or on more data
makes it again. Hashes are those of `pandas.util.hash_array`, which are the same on every machine.
"""

import numpy as np
from numpy.typing import NDArray
from pandas.util import hash_array

IntArray = NDArray[np.int64]


def window_starts(positions: IntArray, max_items: int, stride: int) -> IntArray:
    """The first item that the sample at each position sees; it sees `history[start:position]`.

    The left edge moves in steps of `stride`, so that a long history shows max_items to max_items + stride - 1 items.
    """
    starts: IntArray = np.maximum(0, (positions - max_items) // stride * stride)
    return starts


def last_window(length: int, max_items: int, stride: int) -> slice:
    """Which items a query reads of a history of `length`: the window of a sample that comes next."""
    (start,) = window_starts(np.array([length]), max_items, stride)
    return slice(int(start), length)


def sample_ids(user_hashes: IntArray, positions: IntArray) -> IntArray:
    """A stable 64-bit id for each (user, position). Among 1e9 samples about 0.03 pairs are expected to collide."""
    position_hashes = hash_array(positions.astype(np.uint64))
    hashes: NDArray[np.uint64] = hash_array(user_hashes.view(np.uint64) ^ position_hashes)
    return hashes.view(np.int64)


def in_fraction(ids: IntArray, fraction: float) -> NDArray[np.bool_]:
    """Whether each sample belongs to the given share of all; a smaller share is a subset of a larger one."""
    uniform = (ids.view(np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
    return uniform < fraction


def windows_in_fraction(user_hashes: IntArray, starts: IntArray, fraction: float) -> NDArray[np.bool_]:
    """`in_fraction` for samples whose windows begin at `starts`: those that share a window's beginning go together."""
    return in_fraction(sample_ids(user_hashes, starts), fraction)


def item_shards(item_indices: NDArray[np.int32], num_shards: int) -> IntArray:
    """The shard that holds all rows of each item."""
    hashes: NDArray[np.uint64] = hash_array(item_indices.astype(np.uint64))
    return (hashes % np.uint64(num_shards)).astype(np.int64)
