"""The query that recommenders, index shards and the HTTP endpoint share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from l2d_ray.core.arrays import IntArray

History = Sequence[int | str] | NDArray[np.integer]
"""Items in time order: item indices, or titles of items that the catalogue does not know."""


def indexed_items(history: History) -> IntArray:
    """Return the items of a history that are given by their index, in its order; without titles."""
    indexed = history if isinstance(history, np.ndarray) else [item for item in history if not isinstance(item, str)]
    return np.asarray(indexed, np.int64)


def known_items(history: History, num_items: int) -> IntArray:
    """Return the items of a history that are in a catalogue of `num_items` items, in its order."""
    items = indexed_items(history)
    return items[(items >= 0) & (items < num_items)]


@dataclass(frozen=True)
class Query:
    """A history, and which items may be recommended after it.

    Filters take items out of a list; they never change a score.
    """

    history: History
    """The items of the user, at least one."""
    k: int = 20
    """Number of items to recommend, at most."""
    exclude: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    """Items that must not be recommended, ascending, each once."""
    allow: IntArray | None = None
    """The only items that may be recommended; None allows all."""
    aggregation: str = "global"
    """Name of an L2D aggregation. Other recommenders ignore it."""
    top_m: int = 200
    """M of L2D-L: number of nearest memory rows to aggregate. Other recommenders ignore it."""
    timestamp: int | None = None
    """Time of the query in the unit of the dataset. None is a moment after all of the data."""
    sample_id: int | None = None
    """The sample that an evaluation asks about, for recommenders that look lists up; None outside of an evaluation."""
    explain: bool = False
    """Whether the scores of the aggregation `posterior` are to be explained. Other recommenders ignore it."""

    @classmethod
    def after(
        cls,
        history: History,
        k: int = 20,
        exclude_seen: bool = True,
        deny: ArrayLike = (),
        **options: Any,
    ) -> Self:
        """Build a query that excludes `deny` and, with `exclude_seen`, the items of the history.

        `options` are the remaining fields.
        """
        seen = indexed_items(history if exclude_seen else [])
        exclude = np.union1d(np.asarray(deny, np.int64), seen)
        return cls(history, k, exclude, **options)
