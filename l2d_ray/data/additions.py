"""Items that are added to a dataset without interactions, so that they can be recommended by their titles.

They get the indices after those of the dataset, as items that come with interactions do (`growth`). Any dataset can get
items, whatever its split, because no history changes. An item that the dataset has with the same title adds nothing.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from l2d_ray.config import Config
from l2d_ray.data import table
from l2d_ray.data.catalogue import Catalogue, Rejection, catalogue_of
from l2d_ray.data.growth import grow_catalogue
from l2d_ray.errors import InputError
from l2d_ray.schema import ITEMS

MAX_CHARS = 500
"""Characters of a title, at most. The prompt cuts titles far earlier, so a longer one is a mistake."""


def read_new_items(config: Config, held: pa.Table) -> pa.Table:
    """Return the items of `data.items` that a dataset with the items `held` lacks; both as `schema.ITEMS`.

    The file has the columns of `data.columns`. Raises InputError if it is missing or malformed, for an item that the
    dataset has with another title, and for a title that is empty or too long.
    """
    path = config.data.items
    if path is None:
        raise InputError("data.items is missing; give the file of the items to add, with their ids and titles")
    given = catalogue_of(table.read_items(config), config)
    grown, changed = grow_catalogue(held, given)
    if changed:
        item_id, title, known = _first_change(held, given)
        raise InputError(
            f"data.items={path!r}: item {item_id!r} has the title {_short(title)!r}, but {_short(known)!r} in the"
            " dataset, with which memory rows were made; leave it out, or give it another id"
        )
    new = slice(len(held), None)
    lengths = pc.utf8_length(grown.titles[new]).to_numpy(zero_copy_only=False)
    refused = np.where(lengths > MAX_CHARS, Rejection.LONG_TITLE, grown.verdicts[new])
    for row in np.flatnonzero(refused)[:1].tolist():
        item_id, title = (column[new][row].as_py() for column in (grown.item_ids, grown.titles))
        raise InputError(
            f"data.items={path!r}: item {item_id!r}: its title {_short(title)!r} has {len(title)} characters; give 2 to"
            f" {MAX_CHARS}, of at most data.max_title_words={config.data.max_title_words} words"
        )
    columns = [pa.array(np.arange(len(grown)), pa.int32()), grown.item_ids, grown.titles]
    return pa.table(columns, schema=ITEMS).slice(len(held))


def _first_change(held: pa.Table, given: Catalogue) -> tuple[str, str, str]:
    """Return the first given item that is held with another title: its id, this title and the one that is held."""
    titles = dict(zip(held["item_id"].to_pylist(), held["title"].to_pylist(), strict=True))
    pairs = zip(given.item_ids.to_pylist(), given.titles.to_pylist(), strict=True)
    return next((item, title, titles[item]) for item, title in pairs if titles.get(item, title) != title)


def _short(title: str) -> str:
    return title if len(title) <= 60 else f"{title[:60]}…"
