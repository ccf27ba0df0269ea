"""The division of samples into training, validation and test. A sample is a position of a history after the first.

Blocks are those of `histories`: in order, they hold the users in order. A user's splits never decrease along the
history.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.data.histories import Lists
from l2d_ray.schema import Split

SHARES = (0.8, 0.9)
"""Shares of the samples before the two cuts of the time split: 8:1:1."""

_BINS = 1 << 16


@dataclass(frozen=True)
class Cut:
    """A cut through all samples in the order of (time of the target, user, position)."""

    at: int
    """Samples with earlier targets are before the cut."""
    ties: int
    """Number of samples with targets at this time that are before the cut: the first ones."""


def leave_one_out(times: Lists) -> NDArray[np.int8]:
    """Return [N] the splits: a user's last item TEST, the one before VALID, the others TRAIN, but the first NONE."""
    from_the_end = np.repeat(times.lengths, times.lengths) - times.positions
    splits = np.select([from_the_end == 1, from_the_end == 2], [Split.TEST, Split.VALID], Split.TRAIN)
    return np.where(times.positions == 0, Split.NONE, splits).astype(np.int8)


def everything(times: Lists, held_U: NDArray[np.int64]) -> NDArray[np.int8]:
    """Return [N] the splits: TRAIN for all, but NONE for a user's first and for the first `held_U` [U] of each."""
    first = np.repeat(np.maximum(held_U, 1), times.lengths)
    return np.where(times.positions < first, Split.NONE, Split.TRAIN).astype(np.int8)


def by_time(times: Lists, cuts: Sequence[Cut]) -> NDArray[np.int8]:
    """Return [N] the splits: TRAIN before the first cut, VALID before the second, TEST after it.

    `Cut.ties` counts samples of this block.
    """
    is_target = times.positions > 0
    splits = np.where(is_target, Split.TRAIN, Split.NONE)
    for cut in cuts:
        tied = is_target & (times.values == cut.at)
        splits += is_target & ((times.values > cut.at) | (tied & (np.cumsum(tied) > cut.ties)))
    return splits.astype(np.int8)


def target_times(times: Lists) -> NDArray[np.int64]:
    """Return the times of a block's targets, in the order of the block."""
    return np.asarray(times.values[times.positions > 0], dtype=np.int64)


def histogram(targets: NDArray[np.int64], low: int, width: int) -> NDArray[np.int64]:
    """Return [bins] the number of targets in [low + i * width, low + (i + 1) * width) for each bin i."""
    # `high` may be beyond int64, which is no problem for Python's integers.
    high = min(low + width * _BINS - 1, np.iinfo(np.int64).max)
    inside = targets[(targets >= low) & (targets <= high)]
    bins = (inside.astype(np.uint64) - np.uint64(low % 2**64)) // np.uint64(width)
    return np.bincount(bins.astype(np.int64), minlength=_BINS)


def find_cut(rank: int, low: int, high: int, count: Callable[[int, int], NDArray[np.int64]]) -> Cut:
    """Return the cut before the sample of this rank, from 0, if all targets are in [low, high].

    `count(low, width)` returns the `histogram` of all blocks. It is called at most 4 times, or 2 times for a few
    decades in seconds. Memory is that of one histogram, for any number of samples.
    """
    size = high - low + 1
    while size > 1:
        width = -(-size // _BINS)
        before = np.cumsum(count(low, width))
        chosen = int(np.searchsorted(before, rank, side="right"))
        rank -= int(before[chosen - 1]) if chosen else 0
        low, size = low + chosen * width, min(width, size - chosen * width)
    return Cut(low, rank)


def share_ties(cut: Cut, tied: Sequence[int]) -> list[Cut]:
    """Return the cut for each block, where `tied[b]` targets of block b are at the time of the cut."""
    left = cut.ties - (np.cumsum(tied) - np.asarray(tied))
    return [Cut(cut.at, int(ties)) for ties in np.clip(left, 0, tied)]
