"""The rules by which a dataset grows, with `data.append=true`.

Nothing that the dataset has ever changes: no index or title of an item, no place of an interaction in its user's
history, no sample id. So hidden states that were made of it stay valid. Only jobs/erase.py takes something away
(`erasure`). An interaction is its user, item and time.
Those that are given enter, except for the ones below, which are counted by reason:

repeated
    The dataset has it, or it was given twice. A file may be delivered again, and files may overlap.
late
    It is older than the newest one that the dataset has of its user: it would move others. One of the same time is not.
future
    It is more than CLOCK_SKEW seconds ahead of the clock. What its user does until then would be late. Deliver it again
    when its time has come. A first preparation does not look at the clock.
k_core
    Its user or item is new, and has fewer than data.min_interactions among those that are given and enter. Users and
    items that the dataset has stay in it and need no number. With data.min_interactions=1 all enter at once. Otherwise
    nothing is kept for later: a user or item that passes the threshold enters once a delivery has enough of it. Deliver
    a longer piece of the log, of which the rest is repeated.
unknown_item, no_title, long_title, outside_period
    As in a first preparation. An item that the dataset has is never unknown.

A changed title is not taken, because rows of the memory were made with the old one; it is counted. An item that is
missing from data.items stays in the dataset, so the file may hold the new items alone.

Only data.split=none grows. `leave-one-out` would turn test samples into training samples, and samples after the cuts of
`time` would never train. To evaluate, prepare a workspace with a split.
"""

import time
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l2d_ray.core.arrays import IntArray
from l2d_ray.core.times import units_per_second
from l2d_ray.data.catalogue import Catalogue
from l2d_ray.data.histories import GROWN, Lists, as_lists

CLOCK_SKEW = 300
"""Seconds by which a time may be ahead of the clock of the machine that runs the job."""


def latest_time(users: Iterable[pa.Table]) -> int:
    """Return the latest time that is not in the future, in the unit of the times of these histories."""
    newest = max((int(Lists.of(table["timestamps"]).values.max()) for table in users), default=0)
    return int((time.time() + CLOCK_SKEW) * units_per_second(newest))


def grow_catalogue(items: pa.Table, given: Catalogue) -> tuple[Catalogue, int]:
    """Return a dataset's items (`schema.ITEMS`) followed by the given ones that it lacks, and count changed titles."""
    item_ids, titles = (items[name].combine_chunks() for name in ("item_id", "title"))
    place = pc.index_in(given.item_ids, value_set=item_ids)
    is_known = pc.is_valid(place)
    changed = pc.sum(pc.not_equal(given.titles.filter(is_known), titles.take(place.filter(is_known)))).as_py() or 0
    is_new = pc.invert(is_known)
    verdicts = given.verdicts[is_new.to_numpy(zero_copy_only=False)]
    return Catalogue(
        pa.concat_arrays([item_ids, given.item_ids.filter(is_new)]),
        pa.concat_arrays([titles, given.titles.filter(is_new)]),
        np.concatenate([np.zeros(len(item_ids), dtype=verdicts.dtype), verdicts]),
    ), int(changed)


def select_new(given: pa.Table, held: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Return what given histories (`histories.BLOCK`) add to a dataset, and count the refused interactions by reason.

    `held` (`schema.HISTORIES`) is what the dataset has of the same users. The result (`histories.GROWN`) has the users
    with something new, each with what is held and then what is new.
    """
    items, times, user_N, is_held = _side_by_side(given, held)
    repeated = _repeats(user_N, items, times) & ~is_held
    last_U = np.full(len(given), np.iinfo(np.int64).min)
    np.maximum.at(last_U, user_N[is_held], times[is_held])
    late = ~is_held & ~repeated & (times < last_U[user_N])
    chosen = np.bincount(user_N[~(is_held | repeated | late)], minlength=len(given)) > 0
    kept = ~(repeated | late) & chosen[user_N]
    kept_N = np.flatnonzero(kept)[np.argsort(user_N[kept], kind="stable")]
    offsets = np.append(0, np.cumsum(np.bincount(user_N[kept], minlength=len(given))[chosen]))
    users = given.filter(pa.array(chosen))
    columns = [
        users["user_id"],
        users["user_hash"],
        as_lists(offsets, items[kept_N], pa.int32()),
        as_lists(offsets, times[kept_N], pa.int64()),
        np.bincount(user_N[is_held], minlength=len(given))[chosen],
    ]
    return pa.table(columns, schema=GROWN), {"repeated": int(repeated.sum()), "late": int(late.sum())}


def _side_by_side(given: pa.Table, held: pa.Table) -> tuple[IntArray, IntArray, IntArray, NDArray[np.bool_]]:
    """Return [N] items, times and users (rows of `given`) of all interactions, and whether each is held.

    Those that are held come first.
    """
    rows = [
        pc.index_in(held["user_id"], value_set=given["user_id"].combine_chunks()).to_numpy().astype(np.int64),
        np.arange(len(given)),
    ]
    items, times = ([Lists.of(table[name]) for table in (held, given)] for name in ("item_indices", "timestamps"))
    user_N = np.concatenate([np.repeat(row, lists.lengths) for row, lists in zip(rows, items, strict=True)])
    item_N, time_N = (np.concatenate([lists.values for lists in column]) for column in (items, times))
    return item_N, time_N, user_N, np.arange(len(item_N)) < len(items[0].values)


def _repeats(*columns: IntArray) -> NDArray[np.bool_]:
    """Return [N] whether a row of these columns occurred before."""
    order = np.lexsort(columns)  # stable: of equal rows, the first comes first
    repeats = np.zeros(len(order), dtype=np.bool_)
    repeats[order[1:]] = np.all([values[order[1:]] == values[order[:-1]] for values in columns], axis=0)
    return repeats
