"""Interactions to histories, one row a user, and the k-core, one block of users at a time.

A *block* holds all interactions of its users. Blocks are ranges of the user hash, so that each can be processed alone.
The blocks in order hold the users in order: by user_hash, then by user_id.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.schema import ERASED_ITEM

BLOCK = pa.schema(
    [
        ("user_id", pa.string()),
        ("user_hash", pa.int64()),
        ("item_indices", pa.list_(pa.int32())),
        ("timestamps", pa.list_(pa.int64())),
    ]
)
"""Histories during preparation: `item_indices` are candidate indices (rows of the items file)."""

GROWN = BLOCK.append(pa.field("held", pa.int64()))
"""Histories while a dataset grows: the first `held` interactions of each are in the dataset already."""

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


def without_erased(items: Lists) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Return [N] whether an interaction is not erased (`schema.ERASED_ITEM`), and [U + 1] the offsets without those."""
    is_left = items.values != ERASED_ITEM
    return is_left, np.append(0, np.cumsum(is_left))[items.offsets]


def occurring_items(block: pa.Table) -> NDArray[np.int32]:
    """Return the items of a block, each once."""
    items = Lists.of(block["item_indices"])
    return np.unique(items.values[without_erased(items)[0]])


def num_interactions(block: pa.Table) -> int:
    """Return the number of interactions of a block."""
    return int(np.count_nonzero(without_erased(Lists.of(block["item_indices"]))[0]))


def renumber(items: NDArray[np.int32], new_index: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return items under their new indices."""
    return np.where(items == ERASED_ITEM, np.int32(ERASED_ITEM), new_index[np.maximum(items, 0)])


def range_boundaries(parts: int) -> list[int]:
    """Return the `parts` - 1 user hashes at which the second and later of equal ranges of int64 start, ascending."""
    return [-(2**63) + part * 2**64 // parts for part in range(1, parts)]


def group(interactions: pa.Table) -> pa.Table:
    """Return a BLOCK from all interactions (`interactions.READ`) of its users.

    A history is in time order. The order of the input (file, then row) breaks ties.
    """
    ordered = interactions.sort_by([(name, "ascending") for name in _ORDER]).combine_chunks()
    starts = np.flatnonzero(first_rows(ordered))
    offsets = np.append(starts, len(ordered))
    return pa.table(
        [
            ordered["user_id"].take(pa.array(starts)),
            ordered["user_hash"].take(pa.array(starts)),
            as_lists(offsets, ordered["item"].to_numpy(), pa.int32()),
            as_lists(offsets, ordered["timestamp"].to_numpy(), pa.int64()),
        ],
        schema=BLOCK,
    )


def first_rows(ordered: pa.Table) -> NDArray[np.bool_]:
    """Return [N] whether a row is the first one of its user, in a table in the order of (user_hash, user_id)."""
    hashes, codes = ordered["user_hash"].to_numpy(), _codes(ordered["user_id"])
    return np.append(True, (hashes[1:] != hashes[:-1]) | (codes[1:] != codes[:-1]))[: len(ordered)]


def as_lists(offsets: NDArray[np.int64], values: NDArray[np.generic], kind: pa.DataType) -> pa.Array:
    """Return a list column from its flat view; the inverse of `Lists.of`."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))


def held_lengths(block: pa.Table) -> NDArray[np.int64]:
    """Return [U] how many interactions of each history the dataset has: the column `held` of GROWN, 0 in a BLOCK."""
    held = block["held"].to_numpy() if "held" in block.column_names else np.zeros(len(block), dtype=np.int64)
    return np.asarray(held, dtype=np.int64)


def in_core(block: pa.Table, stays: NDArray[np.bool_], k: int) -> NDArray[np.bool_]:
    """Return [N] whether an interaction's item stays (`stays`, by candidate) and its user has at least k of those.

    A user whom the dataset has needs no number. The place of an erased interaction stays.
    """
    items = Lists.of(block["item_indices"])
    kept: NDArray[np.bool_] = stays[np.maximum(items.values, 0)] | (items.values == ERASED_ITEM)
    if len(kept) == 0:
        return kept
    per_user = np.add.reduceat(kept, items.offsets[:-1], dtype=np.int64)
    return np.asarray(kept & np.repeat((per_user >= k) | (held_lengths(block) > 0), items.lengths))


def item_counts(block: pa.Table, stays: NDArray[np.bool_], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the items of the interactions that are `in_core`, each once, and their numbers of interactions.

    This is one pass of the k-core (Batagelj and Zaversnik, arXiv cs/0310049). The caller adds up the counts of all
    blocks, drops the items with fewer than k, and repeats until it drops none. The interactions that are then `in_core`
    are the largest set in which every user and every item occurs k times, whatever the blocks and their order.
    """
    items = Lists.of(block["item_indices"])
    counted = in_core(block, stays, k) & without_erased(items)[0]
    found, counts = np.unique(items.values[counted], return_counts=True)
    return found, counts


def select(block: pa.Table, stays: NDArray[np.bool_], k: int) -> pa.Table:
    """Return the block's interactions that are `in_core`, without the users who have no new one left."""
    items = Lists.of(block["item_indices"])
    kept = in_core(block, stays, k)
    if len(kept) == 0:
        return block
    per_user = np.add.reduceat(kept, items.offsets[:-1], dtype=np.int64)
    chosen = per_user > held_lengths(block)
    kept &= np.repeat(chosen, items.lengths)
    offsets = np.append(0, np.cumsum(per_user[chosen]))
    users = block.filter(pa.array(chosen))
    for name, values in (("item_indices", items.values), ("timestamps", Lists.of(block["timestamps"]).values)):
        column = BLOCK.get_field_index(name)
        lists = as_lists(offsets, values[kept], BLOCK.field(name).type.value_type)
        users = users.set_column(column, BLOCK.field(name), lists)
    return users


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return [N] the number of each string among the distinct strings."""
    encoded = column.combine_chunks().dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    return np.asarray(encoded.indices.to_numpy(), dtype=np.int64)
