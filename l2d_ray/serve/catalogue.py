"""Ids and titles of the items, with a search by title."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_WORDS = 20
"""Words of a title query that are used; the rest is ignored."""


class ItemCatalogue:
    """Ids and titles of all items. An item's index is its position."""

    def __init__(self, items: pa.Table) -> None:
        """Read the columns `item_id` and `title` of `items` (see `schema.ITEMS`)."""
        self.ids: list[str] = items["item_id"].to_pylist()
        self.titles: list[str] = items["title"].to_pylist()
        self._index = {item_id: index for index, item_id in enumerate(self.ids)}
        self._indices = pa.array(np.arange(len(self.ids)))
        self._folded = _fold(items["title"].combine_chunks())

    def index(self, item_id: str) -> int | None:
        """Return the index of an item, or None if the catalogue does not know it."""
        return self._index.get(item_id)

    def unknown(self, item_ids: Iterable[str]) -> list[str]:
        """Return the ids that the catalogue does not know, each once, in order."""
        return [item_id for item_id in dict.fromkeys(item_ids) if item_id not in self._index]

    def search(self, query: str, limit: int) -> Sequence[int]:
        """Return at most `limit` items whose titles contain every word of `query`; ignores case and accents.

        Titles that begin with the query come first, then shorter ones. A query without words finds the first items.
        """
        folded = _fold(pa.array([query]))[0].as_py()
        words = list(dict.fromkeys(folded.split()))[:MAX_WORDS]
        if not words:
            return range(min(limit, len(self.ids)))
        found, titles = self._indices, self._folded
        for word in words:
            contains = pc.match_substring(titles, word)
            found, titles = found.filter(contains), titles.filter(contains)
        table = pa.table(
            {
                "index": found,
                "begins": pc.starts_with(titles, folded),
                "length": pc.utf8_length(titles),
            }
        )
        order = [("begins", "descending"), ("length", "ascending"), ("index", "ascending")]
        indices: list[int] = table.sort_by(order)["index"].slice(0, limit).to_pylist()
        return indices


def _fold(texts: pa.Array) -> pa.Array:
    """Return the texts in lower case, without accents."""
    decomposed = pc.utf8_lower(pc.utf8_normalize(texts.cast(pa.string()), form="NFKD"))
    return pc.replace_substring_regex(decomposed, r"\p{Mn}", "")
