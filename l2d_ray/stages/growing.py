"""Sums, counts and indexes that grow with time, for `stages.fresh`: their state at several moments.

Time goes forward: each moment adds the rows since the one before. Asked for an earlier moment, they start again.

Shapes: N rows in the order of time, I items, D hidden size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import Config
from l2d_ray.core.arrays import Amounts, Float64, FloatArray, IntArray
from l2d_ray.core.decay import NO_DAY, days_of, weights
from l2d_ray.core.moments import ItemSums, add_rows
from l2d_ray.core.posterior import FLOOR, ItemScorer, Parameters
from l2d_ray.core.samples import in_fraction
from l2d_ray.core.space import ItemMeans, LinearMap
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import TrainingInteractions
from l2d_ray.index.manifest import PosteriorRecord
from l2d_ray.index.shard import IndexShard, Segment
from l2d_ray.index.vector_search import VectorSearch
from l2d_ray.memory.deletions import LiveUnit
from l2d_ray.memory.manifest import UnitRecord
from l2d_ray.memory.store import unit_path
from l2d_ray.schema import hidden_states
from l2d_ray.stages.extraction import held_out_store, plan_held_out
from l2d_ray.stages.index_plan import IndexPlan
from l2d_ray.stages.indexing import map_rows
from l2d_ray.stages.item_means import IndexMeans, read_maps

COLUMNS = ("timestamp", "item_index", "sample_id")
ROWS_AT_ONCE = 16_384
"""Rows that are converted to float64 together."""


@dataclass(frozen=True)
class Rows:
    """Memory rows of all splits, in the order of time."""

    times_N: IntArray
    items_N: NDArray[np.int32]
    sample_ids_N: IntArray
    states_ND: NDArray[np.float16]

    @classmethod
    def read(cls, config: Config, plan: IndexPlan) -> "Rows":
        """Read the rows of the memory that an index has, and the same share of those of validation and test samples.

        Raises InputError if these are not there.
        """
        batches = [batch for shard in range(plan.num_shards) for batch in plan.rows(shard)]
        batches += _held_out(config, plan)
        columns = [np.concatenate([batch.column(name).to_numpy() for batch in batches]) for name in COLUMNS]
        order_N = np.lexsort((columns[2], columns[0]))  # by time, then by sample
        states_ND = np.concatenate([hidden_states(batch) for batch in batches])[order_N]
        times_N, items_N, sample_ids_N = (column[order_N] for column in columns)
        return cls(times_N, items_N, sample_ids_N, states_ND)


def _held_out(config: Config, plan: IndexPlan) -> Iterator[pa.RecordBatch]:
    dataset = Dataset.open(plan.workspace)
    store, kept = held_out_store(dataset.workspace), plan.config.sample_fraction
    for unit in plan_held_out(config, dataset):
        for rows in LiveUnit(UnitRecord.read(store.workspace, unit_path(unit.name))).read(store.workspace):
            yield rows.filter(pa.array(in_fraction(rows.column("sample_id").to_numpy(), kept)))


@dataclass
class GrowingCounts:
    """Transitions among samples that are older than a moment."""

    history: TrainingInteractions
    num_items: int
    half_life_days: float | None
    moment: int | None = None
    counts: TransitionCounts | None = None

    def at(self, moment: int) -> TransitionCounts:
        """Return the counts at a moment: those of the moment before, and those of the samples since."""
        if self.counts is None or self.moment is None or moment < self.moment:
            self.counts = self.moment = None
        if self.counts is None or moment != self.moment:
            new = self.history.before(moment, self.moment)
            counts = TransitionCounts.count([new], self.num_items, np.arange(self.num_items), self.half_life_days)
            self.counts = counts.plus(self.counts) if self.counts else counts
        self.moment = moment
        return self.counts


@dataclass
class GrowingSums:
    """Sums of the rows of each item that are older than a moment; with a half-life, on the day of the newest one."""

    rows: Rows
    half_life_days: float | None
    sums_ID: Float64
    counts_I: Amounts
    stop: int = 0
    """Number of rows in the sums."""
    newest_day: int = NO_DAY

    @classmethod
    def of(cls, rows: Rows, num_items: int, half_life_days: float | None) -> "GrowingSums":
        """Return the sums of no rows yet."""
        counts_I = np.zeros(num_items, np.float64 if half_life_days else np.int64)
        return cls(rows, half_life_days, np.zeros((num_items, rows.states_ND.shape[1])), counts_I)

    def move_to(self, moment: int) -> NDArray[np.bool_]:
        """Add the rows up to a moment, not earlier than the last one. Return [I] whether an item's count changed."""
        start, self.stop = self.stop, int(np.searchsorted(self.rows.times_N, moment))
        before_I = self.counts_I.copy()
        if self.half_life_days and self.stop > start:
            newest_day = int(self._days_N[self.stop - 1])
            factor = weights(self.newest_day, newest_day, self.half_life_days)
            self.sums_ID *= factor
            self.counts_I *= factor
            self.newest_day = newest_day
        for first in range(start, self.stop, ROWS_AT_ONCE):
            part = slice(first, min(first + ROWS_AT_ONCE, self.stop))
            weights_N = None
            if self.half_life_days:
                weights_N = weights(self._days_N[part], self.newest_day, self.half_life_days)
            add_rows(self.sums_ID, self.counts_I, self.rows.states_ND[part], self.rows.items_N[part], weights_N)
        changed_I: NDArray[np.bool_] = self.counts_I != before_I
        return changed_I

    @cached_property
    def _days_N(self) -> IntArray:
        return days_of(self.rows.times_N)


@dataclass
class GrowingIndex:
    """An index at a moment, in one shard."""

    plan: IndexPlan
    rows: Rows
    num_items: int
    space: LinearMap
    offset_D: Float64
    estimate: ItemMeans
    _sums: GrowingSums = field(init=False)
    _centroids_ID: NDArray[np.float32] = field(init=False)

    @classmethod
    def open(cls, plan: IndexPlan, rows: Rows, num_items: int) -> "GrowingIndex":
        """Read what was fitted for an index, which must be complete."""
        return cls(plan, rows, num_items, *read_maps(plan))

    def __post_init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums = GrowingSums.of(self.rows, self.num_items, self.plan.config.half_life_days)
        self._centroids_ID = np.zeros(self._sums.sums_ID.shape, np.float32)

    def at(self, moment: int) -> IndexShard:
        """Return the index of the rows that are older than a moment, without the aggregation `posterior`."""
        if np.searchsorted(self.rows.times_N, moment) < self._sums.stop:
            self._restart()
        changed_I = self._sums.move_to(moment)
        counts_I, stop = self._sums.counts_I, self._sums.stop
        changed_I &= counts_I > 0
        means_ID = self.space(self._sums.sums_ID[changed_I] / counts_I[changed_I, None])
        self._centroids_ID[changed_I] = self.estimate(means_ID, counts_I[changed_I])
        items_I = np.flatnonzero(counts_I > 0)
        vectors = VectorSearch.scan(self._mapped_ND[:stop], self.offset_D)
        return IndexShard(
            segments=[Segment(vectors, self.rows.items_N[:stop], self.rows.sample_ids_N[:stop])],
            centroids=VectorSearch.over(self._centroids_ID[items_I], self.offset_D),
            items_I=items_I.astype(np.int32),
            counts_I=counts_I[items_I],
        )

    def scorer(self, counts: TransitionCounts, titles_ID: FloatArray) -> ItemScorer:
        """Return the scores of the aggregation `posterior` at the moment that `at` was last asked for."""
        parameters = self._parameters
        known_I = np.flatnonzero(self._sums.counts_I > 0)
        sums = ItemSums(known_I, self._sums.counts_I[known_I], self._sums.sums_ID[known_I])
        means = IndexMeans(1, lambda _: sums, titles_ID, self.space, self.offset_D, self.estimate)
        return ItemScorer(
            items_V=np.arange(self.num_items),
            means_VD=means.shard(0).with_titles(parameters.title).astype(np.float32),
            offset_D=self.offset_D,
            unseen_V=counts.samples_V == 0,
            transitions=counts.weigh(parameters.lag_decay, FLOOR),
            parameters=parameters,
        )

    @cached_property
    def _parameters(self) -> Parameters:
        return PosteriorRecord.read(self.plan.workspace, self.plan.posterior).parameters

    @cached_property
    def _mapped_ND(self) -> NDArray[np.float16]:
        states_ND = self.rows.states_ND
        blocks = range(0, len(states_ND), ROWS_AT_ONCE)
        return np.concatenate(
            [states_ND[:0], *(map_rows(self.plan, self.space, states_ND[start:][:ROWS_AT_ONCE]) for start in blocks)]
        )
