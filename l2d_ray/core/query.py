"""The query that recommenders, index shards and the HTTP endpoint share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from l2d_ray.core.arrays import IntArray


@dataclass(frozen=True)
class Query:
    """A history, and which items may be recommended after it.

    Filters take items out of a list; they never change a score.
    """

    history: Sequence[int | str] | NDArray[np.integer]
    """Items in time order, at least one: item indices, or titles of items that the catalogue does not know."""
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

    @classmethod
    def after(
        cls,
        history: Sequence[int | str] | NDArray[np.integer],
        k: int = 20,
        exclude_seen: bool = True,
        deny: ArrayLike = (),
        **options: Any,
    ) -> Self:
        """Build a query that excludes `deny` and, with `exclude_seen`, the items of the history.

        `options` are the remaining fields: `allow`, `aggregation`, `top_m`.
        """
        seen = [int(item) for item in history if not isinstance(item, str)] if exclude_seen else []
        exclude = np.union1d(np.asarray(deny, np.int64), np.asarray(seen, np.int64))
        return cls(history, k, exclude, **options)
