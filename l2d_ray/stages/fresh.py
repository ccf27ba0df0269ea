"""Resources of recommenders as they were at a moment of the past, for `evaluate.memory=fresh`.

A query sees exactly what is older than the last refresh before it: interactions and memory rows of any split and of any
user, the user's own among them. A refresh is at midnight (UTC) every `evaluate.refresh_days` days, counted from the
start of Unix time. So no query sees the future. That holds for data.split=leave-one-out, too, where a stale memory also
has what other users did later.

Learned weights stay those of the training samples: the language model, recommenders that jobs/train.py trained, the
maps of the indexes, and the parameters of the aggregation `posterior`. An index that grows keeps the last two as well.
Item means, the prior of L2D-G, transitions and what titles predict are those of an index that was built at the moment
with this map. The search is exact, and all rows are in memory (`stages.growing`).
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property

from l2d_ray.config import Config
from l2d_ray.core.arrays import FloatArray, IntArray
from l2d_ray.core.times import refreshes
from l2d_ray.data.dataset import SAMPLE_SPLITS
from l2d_ray.data.samples import TrainingInteractions, training_interactions
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.recommenders.contract import IndexKey, Need
from l2d_ray.recommenders.resources import Resources
from l2d_ray.recommenders.title_states import title_states
from l2d_ray.stages.growing import GrowingCounts, GrowingIndex, Rows
from l2d_ray.stages.index_plan import IndexPlan, plan_index

CHANGING = frozenset({Need.TRAINING_INTERACTIONS, Need.INDEX})
"""Needs of recommenders that are made again after a refresh."""


class FreshResources(Resources):
    """Parts of a workspace as they were at a moment: interactions and memory rows are older, and no weight changes."""

    def __init__(
        self,
        config: Config,
        needs: Collection[Need],
        indexes: Mapping[IndexKey, str],
        fitted: Collection[IndexKey],
    ) -> None:
        """Load nothing yet but interactions. `fitted` are the indexes that the aggregation `posterior` needs."""
        super().__init__(config, needs, indexes)
        self._fitted, self._moment = fitted, 0
        self._history = training_interactions(self.dataset, SAMPLE_SPLITS)
        num_items = len(self.dataset.items())
        self._counts = GrowingCounts(self._history, num_items, config.index.half_life_days)
        self._growing: dict[IndexKey, GrowingIndex] = {}

    def refreshes(self, times: IntArray) -> IntArray:
        """Return the moment that a query at each time must be answered at (`refreshes`)."""
        return refreshes(times, self.config.evaluate.refresh_days, int(self._history.timestamps.max()))

    def move_to(self, moment: int) -> None:
        """Go to a moment. Recommenders that learn from interactions or from the memory are made again."""
        if moment == self._moment:
            return
        self._moment = moment
        self.__dict__.pop("training_interactions", None)
        self._indexes.clear()
        self._derived.clear()
        self._made = {named: made for named, made in self._made.items() if not named.needs & CHANGING}

    @cached_property
    def training_interactions(self) -> TrainingInteractions:
        """The samples with older targets, and their histories."""
        self._check(Need.TRAINING_INTERACTIONS)
        return self._history.before(self._moment)

    def _open_index(self, key: IndexKey) -> ShardedIndex:
        if key not in self._growing:
            fraction = key.fraction * self.config.index.sample_fraction
            plan = plan_index(self.config.replace({"index.space": key.space, "index.sample_fraction": fraction}))
            self._growing[key] = GrowingIndex.open(plan, self._rows(plan), len(self.titles))
        growing = self._growing[key]
        shard = growing.at(self._moment)
        if key in self._fitted:
            shard = replace(shard, scorer=growing.scorer(self._counts.at(self._moment), self._titles_ID))
        return ShardedIndex(growing.space, [shard])

    @cached_property
    def _titles_ID(self) -> FloatArray:
        return title_states(self.config, self.dataset)

    def _rows(self, plan: IndexPlan) -> Rows:
        """Return the rows of an index; those of the same share of the memory are shared."""
        same = (one for one in self._growing.values() if one.plan.config.sample_fraction == plan.config.sample_fraction)
        other = next(same, None)
        return other.rows if other else Rows.read(self.config, plan)
