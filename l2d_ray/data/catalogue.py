"""The items of the raw data, and the reasons to leave some of them out."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.data.columns import ITEMS
from l2d_ray.data.sources import PublishedSource, source_of
from l2d_ray.errors import InputError


class Rejection(IntEnum):
    """Reason to drop an interaction while reading."""

    UNKNOWN_ITEM = 1
    """The item is not in the items file."""
    NO_TITLE = 2
    """The title of the item has at most one character."""
    LONG_TITLE = 3
    """The title of the item has more than `data.max_title_words` words."""
    OUTSIDE_PERIOD = 4
    """The interaction is from before `data.since`, or from `data.until` or later."""
    FUTURE = 5
    """A dataset grows, and the interaction is later than now."""


@dataclass(frozen=True)
class Catalogue:
    """All raw items, in the order of their file. Their row numbers are the *candidate* indices."""

    item_ids: pa.Array
    titles: pa.Array
    verdicts: NDArray[np.uint8]
    """[candidates] the Rejection of an item for its title, or 0."""

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.item_ids)

    def find(self, item_ids: pa.Array) -> NDArray[np.int32]:
        """Return [N] the candidate indices of ids, -1 for unknown ones."""
        found = pc.fill_null(pc.index_in(item_ids, value_set=self.item_ids), -1)
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int32)


def read_catalogue(config: Config) -> Catalogue:
    """Read the items of the configured source and judge their titles by the rules of D3 (arXiv 2406.14900).

    A word ends at each space. A source with a published split is kept whole. Raises InputError for ids that occur
    twice, and wherever the source does.
    """
    source = source_of(config)
    catalogue = catalogue_of(source.read_items(config), config)
    if isinstance(source, PublishedSource):
        return replace(catalogue, verdicts=np.zeros_like(catalogue.verdicts))
    return catalogue


def catalogue_of(tables: Iterable[pa.Table], config: Config) -> Catalogue:
    """Return the items of some tables (`columns.ITEMS`), with verdicts on their titles.

    Raises InputError for no items, and for ids that occur twice.
    """
    items = pa.concat_tables([ITEMS.empty_table(), *tables]).combine_chunks()
    item_ids, titles = (_contiguous(items[name]) for name in ("item_id", "title"))
    if len(item_ids) == 0:
        raise InputError(f"data.items={config.data.items!r}: no items; give the complete file")
    _refuse_duplicates(item_ids, config)
    return Catalogue(item_ids, titles, title_verdicts(titles, config.data.max_title_words))


def title_verdicts(titles: pa.Array, max_words: int) -> NDArray[np.uint8]:
    """Return [N] the Rejection of each title, or 0."""
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
            " keep one row for each item"
        )


def _contiguous(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
