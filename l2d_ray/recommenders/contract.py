"""The contract that every recommender speaks.

Shapes: U histories, K results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import Float64, IntArray
from l2d_ray.core.decoding import ScoredItems

NO_ITEM = -1
"""Fills a list that has fewer than K items; its score is -inf."""
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Filters:
    """Which items may be recommended. A filter takes items out of a list; it changes no score."""

    exclude_seen: bool = True
    """None of the history."""
    deny: IntArray = field(default_factory=lambda: _NONE)
    """None of these."""
    allow: IntArray | None = None
    """Only these, unless None."""

    def excluded(self, histories: Sequence[NDArray[np.integer]]) -> list[IntArray]:
        """For each history the items that must not come back, each once."""
        seen = histories if self.exclude_seen else [_NONE] * len(histories)
        return [np.union1d(self.deny, history).astype(np.int64) for history in seen]


EXCLUDE_SEEN = Filters()
"""The usual: only what is new to the user."""


class Recommender(Protocol):
    """One contract for L2D and for everything it is compared with."""

    def recommend(
        self, histories: Sequence[NDArray[np.int32]], k: int, filters: Filters = EXCLUDE_SEEN
    ) -> tuple[IntArray, Float64]:
        """Items and scores, both [U, K], the best first; no item twice, scores never rising.

        A history holds item indices in time order, at least one. NO_ITEM and -inf fill a list that runs out of items.
        """
        ...


def as_arrays(lists: Sequence[ScoredItems], k: int) -> tuple[IntArray, Float64]:
    """The first K of each list, as items and scores [U, K]."""
    items_UK = np.full((len(lists), k), NO_ITEM, np.int64)
    scores_UK = np.full((len(lists), k), -np.inf)
    for user, scored in enumerate(lists):
        found = min(len(scored), k)
        items_UK[user, :found], scores_UK[user, :found] = scored.items_I[:k], scored.scores_I[:k]
    return items_UK, scores_UK
