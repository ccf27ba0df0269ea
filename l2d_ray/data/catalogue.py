"""The items that may be recommended, and why the others may not."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.data.sources import source_of
from l2d_ray.errors import InputError


class Rejection(IntEnum):
    """Why an interaction is dropped while reading. 0 in `Catalogue.verdicts` means that the item stays."""

    UNKNOWN_ITEM = 1
    """The items file lacks it."""
    NO_TITLE = 2
    """Its title is at most one character long."""
    LONG_TITLE = 3
    """Its title has more than `data.max_title_words` words."""
    OUTSIDE_PERIOD = 4
    """It happened before `data.since`, or on `data.until` or later."""


@dataclass(frozen=True)
class Catalogue:
    """All raw items, in the order of their file; their row numbers are the *candidate* indices."""

    item_ids: pa.Array
    titles: pa.Array
    verdicts: NDArray[np.uint8]
    """[candidates]: 0, or the Rejection that an item's title earns."""

    def __len__(self) -> int:
        """The number of candidates."""
        return len(self.item_ids)

    def find(self, item_ids: pa.Array) -> NDArray[np.int32]:
        """[N] candidate indices of ids, -1 for unknown ones."""
        found = pc.fill_null(pc.index_in(item_ids, value_set=self.item_ids), -1)
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int32)


def read_catalogue(config: Config) -> Catalogue:
    """The items of the configured source with the verdicts of D3's title rules (arXiv 2406.14900), by which a word ends
    at each space. `data.source: d3` is kept as published: no rules.

    Raises InputError for ids that occur twice, and where the source does.
    """
    items = source_of(config).read_items(config).combine_chunks()
    item_ids, titles = (_contiguous(items[name]) for name in ("item_id", "title"))
    if len(item_ids) == 0:
        raise InputError(f"data.items={config.data.items!r}: no items; give the complete file")
    _refuse_duplicates(item_ids, config)
    if config.data.source == "d3":
        return Catalogue(item_ids, titles, np.zeros(len(item_ids), dtype=np.uint8))
    return Catalogue(item_ids, titles, title_verdicts(titles, config.data.max_title_words))


def title_verdicts(titles: pa.Array, max_words: int) -> NDArray[np.uint8]:
    """[N] 0 or the Rejection of each title."""
    words = pc.add(pc.count_substring(titles, " "), 1).to_numpy(zero_copy_only=False)
    length = pc.utf8_length(pc.utf8_trim_whitespace(titles)).to_numpy(zero_copy_only=False)
    verdicts = np.where(words > max_words, Rejection.LONG_TITLE, 0)
    return np.where(length <= 1, Rejection.NO_TITLE, verdicts).astype(np.uint8)


def _refuse_duplicates(item_ids: pa.Array, config: Config) -> None:
    counts = pc.value_counts(item_ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        item_id = repeated.field("values")[0].as_py()
        rows = np.flatnonzero(pc.equal(item_ids, item_id).to_numpy(zero_copy_only=False)) + 1
        where = f"data.items={config.data.items!r}" if config.data.items else "the items"
        raise InputError(
            f"{where}: item {item_id!r} is in rows {rows[0]} and {rows[1]}, and {len(repeated)} ids are repeated;"
            " keep one row an item"
        )


def _contiguous(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
