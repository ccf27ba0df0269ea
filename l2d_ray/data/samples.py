"""Samples of a prepared dataset in typed batches, for extraction, fine-tuning and evaluation alike.

Shapes: N samples, U users, and H interactions in the histories of their users.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from l2d_ray.config import HistoryConfig
from l2d_ray.core.arrays import IntArray
from l2d_ray.core.samples import in_fraction, sample_ids, window_starts, windows_in_fraction
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.generations import Generation
from l2d_ray.data.histories import Lists, without_erased
from l2d_ray.errors import InputError
from l2d_ray.schema import Split


@dataclass(frozen=True)
class Sample:
    """One sample: a user's items before a moment, and the item that came next."""

    sample_id: int
    user_hash: int
    history: NDArray[np.int32]
    """[position] all items before the target, oldest first."""
    target: int
    """Item index."""
    timestamp: int
    """Time of the target."""


@dataclass(frozen=True)
class TrainingInteractions:
    """H training interactions of U users in flat arrays: each user's items up to the last training target.

    Users without a training sample have no part in it.
    """

    items: NDArray[np.int32]
    """[H] item indices, each user's in time order."""
    timestamps: IntArray
    """[H] times of the interactions."""
    offsets: IntArray
    """[U + 1]: the interactions of user u are those from offsets[u] to offsets[u + 1] - 1."""
    is_target: NDArray[np.bool_]
    """[H] whether the interaction is the target of a training sample that has a history."""

    @property
    def targets(self) -> NDArray[np.int32]:
        """[N] target of every training sample that has a history."""
        return self.items[self.is_target]

    @property
    def lasts(self) -> NDArray[np.int32]:
        """[N] last item of the history of every such sample."""
        return self.items[np.flatnonzero(self.is_target) - 1]

    @property
    def target_timestamps(self) -> IntArray:
        """[N] time of every such target."""
        return self.timestamps[self.is_target]

    @property
    def positions(self) -> IntArray:
        """[H] number of the user's items before each interaction."""
        return np.arange(self.items.size) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def before(self, stop: int, start: int | None = None) -> "TrainingInteractions":
        """Return what trains at a moment: the samples with targets older than `stop`, and their histories.

        With `start`, only the samples with targets at that time or later.
        """
        is_target = self.is_target & (self.timestamps < stop)
        if start is not None:
            is_target &= self.timestamps >= start
        users_H = np.repeat(np.arange(self.offsets.size - 1), np.diff(self.offsets))
        places_N, ends_U = np.flatnonzero(is_target), self.offsets[:-1].copy()
        ends_U[users_H[places_N]] = places_N + 1  # the last target of a user counts
        kept_H = np.arange(self.items.size) < ends_U[users_H]
        lengths_U = ends_U - self.offsets[:-1]
        return TrainingInteractions(
            self.items[kept_H],
            self.timestamps[kept_H],
            np.cumsum([0, *lengths_U[lengths_U > 0]]),
            is_target[kept_H],
        )


@dataclass(frozen=True)
class SampleBatch:
    """N samples, and the whole histories of their users, one after the other in flat arrays."""

    items: NDArray[np.int32]
    """[H] item indices, in time order. They are not checked against the catalogue."""
    timestamps: IntArray
    """[H] times of the interactions."""
    begins: IntArray
    """[N] where the history of each sample begins in `items`."""
    stops: IntArray
    """[N] where the history stops: the place of the target in `items`."""
    user_hashes: IntArray
    """[N] hashes of the users."""
    sample_ids: IntArray
    """[N] stable ids (`core.samples.sample_ids`)."""

    def __len__(self) -> int:
        return self.stops.size

    @property
    def positions(self) -> IntArray:
        """[N] the number of items before each target in its user's history."""
        return self.stops - self.begins

    @property
    def targets(self) -> NDArray[np.int32]:
        """[N] item indices of the targets."""
        return self.items[self.stops]

    @property
    def target_timestamps(self) -> IntArray:
        """[N] times of the targets."""
        return self.timestamps[self.stops]

    def window_starts(self, history: HistoryConfig) -> IntArray:
        """Return [N] where the window of each sample starts in `items`; it stops at `stops`."""
        return self.begins + window_starts(self.positions, history.max_items, history.stride)

    def select(self, which: slice | NDArray[np.bool_]) -> "SampleBatch":
        """Return the samples of a slice or of a mask [N]; the histories stay as they are."""
        per_sample = (self.begins, self.stops, self.user_hashes, self.sample_ids)
        return SampleBatch(self.items, self.timestamps, *(column[which] for column in per_sample))

    def in_fraction(self, history: HistoryConfig, fraction: float) -> "SampleBatch":
        """Return a share of the samples; those whose windows start at the same item are kept or dropped together."""
        starts = self.window_starts(history) - self.begins
        return self.select(windows_in_fraction(self.user_hashes, starts, fraction))

    def by_user(self) -> Iterator["SampleBatch"]:
        """Yield the samples of one user after the other."""
        bounds = [0, *(np.flatnonzero(np.diff(self.begins)) + 1).tolist(), len(self)]
        return (self.select(slice(start, stop)) for start, stop in pairwise(bounds) if stop > start)

    def records(self) -> Iterator[Sample]:
        """Yield the samples one by one; their histories are copies."""
        columns = (self.sample_ids, self.user_hashes, self.begins, self.stops, self.targets, self.target_timestamps)
        for sample_id, user_hash, begin, stop, target, time in zip(*(c.tolist() for c in columns), strict=True):
            yield Sample(sample_id, user_hash, self.items[begin:stop].copy(), target, time)


def iter_samples(
    dataset: Dataset | Generation, split: Split | Sequence[Split], start: int = 0, stop: int | None = None
) -> Iterator[SampleBatch]:
    """Yield the samples of users start to stop - 1 of a dataset, or those that one generation of it added.

    They are those of one split or of several, in the order of (user, position).

    A batch holds the samples of at most 1,000 users and is never empty. Raises InputError for a damaged dataset.
    """
    for users in dataset.iter_users(start, stop):
        samples = _samples_of(users, split, dataset)
        if len(samples):
            yield samples


def choose_samples(dataset: Dataset, split: Split, limit: int) -> list[Sample]:
    """Return the `limit` samples of a split with the smallest ids, so that fewer samples are a subset of more."""
    share = min(1.0, 1.2 * (limit + 20) / max(dataset.num_samples(split), 1))
    found = [
        sample
        for samples in iter_samples(dataset, split)
        for sample in samples.select(in_fraction(samples.sample_ids, share)).records()
    ]
    return sorted(found, key=lambda sample: sample.sample_id % 2**64)[:limit]


def first_times(dataset: Dataset) -> IntArray:
    """Return the time of the first interaction with each item [I], of any split; the largest time without any."""
    times_I = np.full(len(dataset.items()), np.iinfo(np.int64).max)
    for users in dataset.iter_users():
        items, timestamps = Lists.of(users["item_indices"]), Lists.of(users["timestamps"])
        is_left, _ = without_erased(items)
        np.minimum.at(times_I, items.values[is_left], timestamps.values[is_left])
    return times_I


def training_parts(
    dataset: Dataset | Generation, split: Split | Sequence[Split] = Split.TRAIN
) -> Iterator[TrainingInteractions]:
    """Yield the training interactions of at most 1,000 users at a time, in the order of a dataset or a generation.

    The samples of `split`, which may be several splits, are the training samples.
    """
    return map(_training_part, iter_samples(dataset, split))


def training_interactions(dataset: Dataset, split: Split | Sequence[Split] = Split.TRAIN) -> TrainingInteractions:
    """Return the training interactions of all users, in the order of the dataset (`training_parts`)."""
    parts = list(training_parts(dataset, split))
    nothing = TrainingInteractions(
        np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(1, np.int64), np.empty(0, np.bool_)
    )
    items, timestamps, is_target = (
        np.concatenate([getattr(part, name) for part in [nothing, *parts]])
        for name in ("items", "timestamps", "is_target")
    )
    lengths = np.concatenate([np.diff(part.offsets) for part in [nothing, *parts]])
    return TrainingInteractions(items, timestamps, np.cumsum([0, *lengths]), is_target)


def _training_part(samples: SampleBatch) -> TrainingInteractions:
    """Return the training interactions of the users of these training samples."""
    begins, first_N = np.unique(samples.begins, return_index=True)
    ends = samples.stops[np.append(first_N[1:], len(samples)) - 1] + 1
    lengths = ends - begins
    offsets = np.cumsum([0, *lengths])
    kept_H = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], lengths)
    is_target = np.zeros(samples.items.size, np.bool_)
    is_target[samples.stops[samples.positions > 0]] = True
    return TrainingInteractions(samples.items[kept_H], samples.timestamps[kept_H], offsets, is_target[kept_H])


def _samples_of(users: pa.Table, split: Split | Sequence[Split], dataset: Dataset | Generation) -> SampleBatch:
    items, timestamps, splits = (Lists.of(users[name]) for name in ("item_indices", "timestamps", "splits"))
    differs = (items.lengths != timestamps.lengths) | (items.lengths != splits.lengths)
    if differs.any():
        user = f"{dataset.workspace.path('dataset')}: user {users['user_id'][int(np.argmax(differs))].as_py()!r}"
        raise InputError(f"{user}: lists of different lengths; run jobs/prepare_data.py again")
    stops = np.flatnonzero(np.isin(splits.values, split))
    user_N = np.searchsorted(items.offsets, stops, side="right") - 1
    is_left, offsets = without_erased(items)
    user_hashes = users["user_hash"].to_numpy()[user_N]
    ids = sample_ids(user_hashes, stops - items.offsets[user_N])
    begins, stops = offsets[user_N], np.cumsum(is_left)[stops] - 1
    return SampleBatch(items.values[is_left], timestamps.values[is_left], begins, stops, user_hashes, ids)
