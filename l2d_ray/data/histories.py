"""Interactions to histories, one row a user, and the k-core, one block of users at a time.

A *block* holds all interactions of its users. Blocks are ranges of the user hash, so that each can be processed alone.
The blocks in order hold the users in order: by user_hash, then by user_id.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BLOCK = pa.schema(
    [
        ("user_id", pa.string()),
        ("user_hash", pa.int64()),
        ("item_indices", pa.list_(pa.int32())),
        ("timestamps", pa.list_(pa.int64())),
    ]
)
"""Histories during preparation: `item_indices` are candidate indices (rows of the items file)."""

_ORDER = ("user_hash", "user_id", "timestamp", "file", "row")


@dataclass(frozen=True)
class Lists:
    """Flat view of a list column: `values[offsets[u]:offsets[u + 1]]` belongs to user u."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Lists":
        """Return the flat view of a list column."""
        lists = column.combine_chunks()
        if isinstance(lists, pa.ChunkedArray):
            lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], column.type)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return cls(lists.flatten().to_numpy(zero_copy_only=False), offsets - offsets[0])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[U] list lengths."""
        return np.diff(self.offsets)

    @property
    def positions(self) -> NDArray[np.int64]:
        """[N] each value's position in its list."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)


def range_boundaries(parts: int) -> list[int]:
    """Return the `parts` - 1 user hashes at which the second and later of equal ranges of int64 start, ascending."""
    return [-(2**63) + part * 2**64 // parts for part in range(1, parts)]


def group(interactions: pa.Table) -> pa.Table:
    """Return a BLOCK from all interactions (`interactions.READ`) of its users.

    A history is in time order. The order of the input (file, then row) breaks ties.
    """
    ordered = interactions.sort_by([(name, "ascending") for name in _ORDER]).combine_chunks()
    if len(ordered) == 0:
        return BLOCK.empty_table()
    hashes, codes = ordered["user_hash"].to_numpy(), _codes(ordered["user_id"])
    starts = np.flatnonzero(np.r_[True, (hashes[1:] != hashes[:-1]) | (codes[1:] != codes[:-1])])
    offsets = np.r_[starts, len(ordered)]
    return pa.table(
        [
            ordered["user_id"].take(pa.array(starts)),
            hashes[starts],
            as_lists(offsets, ordered["item"].to_numpy(), pa.int32()),
            as_lists(offsets, ordered["timestamp"].to_numpy(), pa.int64()),
        ],
        schema=BLOCK,
    )


def as_lists(offsets: NDArray[np.int64], values: NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    """Return a list column from its flat view; the inverse of `Lists.of`."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def in_core(items: Lists, stays: NDArray[np.bool_], k: int) -> NDArray[np.bool_]:
    """Return [N] whether an interaction's item stays (`stays`, by candidate) and its user has at least k of those."""
    kept: NDArray[np.bool_] = stays[items.values]
    if len(kept) == 0:
        return kept
    per_user = np.add.reduceat(kept, items.offsets[:-1], dtype=np.int64)
    return np.asarray(kept & np.repeat(per_user >= k, items.lengths))


def item_counts(block: pa.Table, stays: NDArray[np.bool_], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the items of the interactions that are `in_core`, each once, and their numbers of interactions.

    This is one pass of the k-core (Batagelj and Zaversnik, arXiv cs/0310049). The caller adds up the counts of all
    blocks, drops the items with fewer than k, and repeats until it drops none. The interactions that are then `in_core`
    are the largest set in which every user and every item occurs k times, whatever the blocks and their order.
    """
    items = Lists.of(block["item_indices"])
    found, counts = np.unique(items.values[in_core(items, stays, k)], return_counts=True)
    return found, counts


def select(block: pa.Table, stays: NDArray[np.bool_], k: int) -> pa.Table:
    """Return the block's interactions that are `in_core`, without the users who have none left."""
    items = Lists.of(block["item_indices"])
    kept = in_core(items, stays, k)
    if len(kept) == 0:
        return block
    per_user = np.add.reduceat(kept, items.offsets[:-1], dtype=np.int64)
    offsets = np.r_[0, np.cumsum(per_user[per_user > 0])]
    users = block.filter(pa.array(per_user > 0))
    times = Lists.of(block["timestamps"]).values
    return pa.table(
        [
            users["user_id"],
            users["user_hash"],
            as_lists(offsets, items.values[kept], pa.int32()),
            as_lists(offsets, times[kept], pa.int64()),
        ],
        schema=BLOCK,
    )


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return [N] the number of each string among the distinct strings."""
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    return np.asarray(encoded.indices.to_numpy(), dtype=np.int64)
