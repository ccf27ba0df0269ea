"""The first step of the index stage: the sums and moments of the rows of each shard (`stages.indexing`)."""

from collections.abc import Collection

import numpy as np

from l2d_ray.core.decay import NO_DAY, days_of, weights
from l2d_ray.core.moments import Moments, add_rows
from l2d_ray.index.moments import ShardMoments, WeightedSums
from l2d_ray.schema import hidden_states
from l2d_ray.stages.index_plan import IndexPlan


def sum_moments(plan: IndexPlan, shard: int) -> None:
    """Sum the item vectors and moments of a shard; skip a shard that is done.

    Starts from the sums of an older snapshot if they are there: adds the units that it lacks, and takes out those that
    it had, or had with more rows. With a half-life it starts anew if there are such units: then the newest day may be
    another.
    """
    workspace, path, units = plan.workspace, plan.moments(shard), set(plan.units)
    if workspace.exists(path):
        return
    older = next((older for older in plan.older() if _can_start_from(older, units, shard)), None)
    if older is None:
        sums = ShardMoments.zero(plan.dimension, plan.config.half_life_days).plus(_sum_rows(plan, shard, units))
    else:
        before = set(older.units)
        sums = ShardMoments.read(workspace, older.moments(shard)).plus(_sum_rows(plan, shard, units - before))
        if gone := before - units:
            sums = sums.plus(_sum_rows(older, shard, gone), sign=-1)
    sums.write(workspace, path)


def _can_start_from(older: IndexPlan, units: set[str], shard: int) -> bool:
    """Return whether the sums of an older snapshot are there, and enough of its units are among these."""
    gone = sum(unit not in units for unit in older.units)
    if gone and older.config.half_life_days:
        return False
    return 2 * gone < len(older.units) and older.workspace.exists(older.moments(shard))


def _sum_rows(plan: IndexPlan, shard: int, units: Collection[str]) -> ShardMoments:
    """Sum the rows that a shard has of some units. The result has no moments of items."""
    half_life_days = plan.config.half_life_days
    columns = ["sample_id", "item_index", *(["timestamp"] if half_life_days else [])]
    occurring, newest_day = [np.empty(0, np.int32)], NO_DAY
    for rows in plan.rows(shard, columns, units=units):
        occurring.append(rows.column("item_index").to_numpy())
        if half_life_days:
            newest_day = max(newest_day, int(days_of(rows.column("timestamp").to_numpy()).max()))
    items_I = np.unique(np.concatenate(occurring))
    sums_ID, counts_I = np.zeros((items_I.size, plan.dimension)), np.zeros(items_I.size, np.int64)
    moments, weighted = Moments.zero(plan.dimension), None
    if half_life_days:
        weighted = WeightedSums(half_life_days, newest_day, np.zeros(items_I.size), np.zeros_like(sums_ID))
    for rows in plan.rows(shard, units=units):
        states_MD, places_M = hidden_states(rows), np.searchsorted(items_I, rows.column("item_index").to_numpy())
        add_rows(sums_ID, counts_I, states_MD, places_M)
        moments += Moments.of_rows(states_MD)
        if weighted:
            weights_M = weights(days_of(rows.column("timestamp").to_numpy()), newest_day, weighted.half_life_days)
            add_rows(weighted.sums_ID, weighted.weights_I, states_MD, places_M, weights_M)
    return ShardMoments(items_I, counts_I, sums_ID, moments, weighted)
