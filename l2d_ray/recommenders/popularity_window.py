"""The items with the most training samples in the days before a query, the same for everybody at that moment.

Source: Ji, Sun, Zhang and Li (arXiv 2005.13829). They find that popularity at the moment of a recommendation is a much
stronger baseline than popularity over all of the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.decoding import ScoredItems, best_of_all
from l2d_ray.core.query import Query
from l2d_ray.core.times import units_per_day
from l2d_ray.recommenders.contract import Declaration, Need, Recommender, logarithms
from l2d_ray.recommenders.tuned import TunedOptions

if TYPE_CHECKING:
    from l2d_ray.recommenders.resources import Resources


@dataclass(frozen=True)
class Events:
    """Targets of the training samples, the oldest first, and their times."""

    timestamps: IntArray
    items: NDArray[np.int32]

    @classmethod
    def of(cls, timestamps: IntArray, targets: NDArray[np.int32]) -> "Events":
        """Sort targets by their times."""
        order = np.argsort(timestamps, kind="stable")
        return cls(timestamps[order], targets[order])


@dataclass(frozen=True)
class PopularityWindow(Recommender):
    """Scores are numbers of training samples in the window, plus a share below 1 that orders items of equal numbers.

    This is the share of the item among all earlier training samples, so that popular items complete a list. A sample
    at the moment of the query, or later, never counts.
    """

    events: Events
    num_items: int
    window: int
    """Length of the window in units of the timestamps."""

    @classmethod
    def over(cls, events: Events, num_items: int, days: int) -> "PopularityWindow":
        """Build the recommender of a window of some days. `units_per_day` says what a day is in the data."""
        newest = int(events.timestamps[-1]) if events.timestamps.size else 0
        return cls(events, num_items, days * units_per_day(newest))

    def recommend(self, queries: Sequence[Query]) -> list[ScoredItems]:
        """Return the permitted items by decreasing popularity at the time of each query."""
        times = self.events.timestamps
        after_all = int(times[-1]) + 1 if times.size else 0
        now_Q = np.array([after_all if query.timestamp is None else query.timestamp for query in queries], np.int64)
        stops_Q = np.searchsorted(times, now_Q)
        starts_Q = np.searchsorted(times, now_Q - self.window)
        lists: dict[int, ScoredItems] = {}
        earlier_I, counted = np.zeros(self.num_items, np.int64), 0
        for n in np.argsort(stops_Q).tolist():  # the counts of a query continue those of an earlier moment
            start, stop, query = starts_Q[n], stops_Q[n], queries[n]
            earlier_I += self._count(counted, stop)
            counted = stop
            scores_I = self._count(start, stop) + earlier_I / (stop + 1)
            scores_I[earlier_I == 0] = -np.inf
            lists[n] = best_of_all(scores_I, query.k, query.exclude, query.allow)
        return [lists[n] for n in range(len(queries))]

    def _count(self, start: int, stop: int) -> IntArray:
        return np.bincount(self.events.items[start:stop], minlength=self.num_items)


@dataclass(frozen=True)
class WindowOptions(TunedOptions):
    """Options of the popularity in a window."""

    NAME, TUNED, VALUES, DEFAULT = "popularity-window", "days", (7, 30), 30

    days: int


def _events(resources: "Resources") -> Events:
    interactions = resources.training_interactions
    return Events.of(interactions.target_timestamps, interactions.targets)


DECLARATION = Declaration(
    pattern=r"popularity-window(-(?P<days>[1-9]\d*))?",
    form="popularity-window[-<days>]",
    examples=("popularity-window", "popularity-window-7"),
    options=WindowOptions,
    make=lambda options, resources: PopularityWindow.over(resources.once(_events), len(resources.titles), options.days),
    needs=frozenset({Need.TRAINING_INTERACTIONS}),
    log_scores=logarithms,
)
