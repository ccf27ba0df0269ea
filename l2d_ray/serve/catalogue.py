"""The items by their own ids, and the search for titles."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MOST_WORDS = 20
"""Of a query for titles."""


class Catalogue:
    """Ids and titles of all items; an item's index is its place."""

    def __init__(self, items: pa.Table) -> None:
        """`items` as of schema.ITEMS."""
        self.ids: list[str] = items["item_id"].to_pylist()
        self.titles: list[str] = items["title"].to_pylist()
        self._index = {item_id: index for index, item_id in enumerate(self.ids)}
        self._indices = pa.array(np.arange(len(self.ids)))
        self._folded = _fold(items["title"].combine_chunks())

    def index(self, item_id: str) -> int | None:
        """The index of an item, None if the catalogue does not know it."""
        return self._index.get(item_id)

    def unknown(self, item_ids: Iterable[str]) -> list[str]:
        """Those that the catalogue does not know, each once, in order."""
        return [item_id for item_id in dict.fromkeys(item_ids) if item_id not in self._index]

    def search(self, query: str, most: int) -> Sequence[int]:
        """Items whose titles hold every word of `query`, in any case, with or without accents.

        Titles that begin with it come first, then the shorter. A query without words finds the first items.
        """
        folded = _fold(pa.array([query]))[0].as_py()
        words = list(dict.fromkeys(folded.split()))[:MOST_WORDS]
        if not words:
            return range(min(most, len(self.ids)))
        found, titles = self._indices, self._folded
        for word in words:
            holds = pc.match_substring(titles, word)
            found, titles = found.filter(holds), titles.filter(holds)
        table = pa.table(
            {
                "index": found,
                "begins": pc.starts_with(titles, folded),
                "length": pc.utf8_length(titles),
            }
        )
        order = [("begins", "descending"), ("length", "ascending"), ("index", "ascending")]
        indices: list[int] = table.sort_by(order)["index"].slice(0, most).to_pylist()
        return indices


def _fold(texts: pa.Array) -> pa.Array:
    """Lower case, without accents."""
    decomposed = pc.utf8_normalize(pc.utf8_lower(texts.cast(pa.string())), form="NFKD")
    return pc.replace_substring_regex(decomposed, r"\p{Mn}", "")
