"""Which samples train, validate and test. A sample is a position of a history after the first; its split is one int8.

Blocks are those of `histories`: in order, they are users in order. A user's splits never decrease along its history.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2d_ray.data.histories import Lists
from l2d_ray.schema import Split

SHARES = (0.8, 0.9)
"""Where the time split cuts: 8:1:1."""

_BINS = 1 << 16


@dataclass(frozen=True)
class Cut:
    """A cut through all samples in order of (time of the target, user, position): before it `time < at`, and the first
    `ties` of those with `time == at`."""

    at: int
    ties: int


def leave_one_out(times: Lists) -> NDArray[np.int8]:
    """[N] a user's last item is TEST, the one before VALID, others TRAIN; the first item is NONE in any case."""
    from_the_end = np.repeat(times.lengths, times.lengths) - times.positions
    splits = np.select([from_the_end == 1, from_the_end == 2], [Split.TEST, Split.VALID], Split.TRAIN)
    return np.where(times.positions == 0, Split.NONE, splits).astype(np.int8)


def by_time(times: Lists, cuts: Sequence[Cut]) -> NDArray[np.int8]:
    """[N] TRAIN before the first cut, VALID before the second, TEST after; `ties` are counted within this block."""
    is_target = times.positions > 0
    splits = np.where(is_target, Split.TRAIN, Split.NONE)
    for cut in cuts:
        tied = is_target & (times.values == cut.at)
        splits += is_target & ((times.values > cut.at) | (tied & (np.cumsum(tied) > cut.ties)))
    return splits.astype(np.int8)


def target_times(times: Lists) -> NDArray[np.int64]:
    """The times of a block's targets, in the order of the block."""
    return np.asarray(times.values[times.positions > 0], dtype=np.int64)


def histogram(targets: NDArray[np.int64], low: int, width: int) -> NDArray[np.int64]:
    """[bins] how many lie in [low + i * width, low + (i + 1) * width); those outside of all bins are not counted."""
    # Python's numbers do not overflow: high may lie past int64.
    high = min(low + width * _BINS - 1, np.iinfo(np.int64).max)
    inside = targets[(targets >= low) & (targets <= high)]
    bins = (inside.astype(np.uint64) - np.uint64(low % 2**64)) // np.uint64(width)
    return np.bincount(bins.astype(np.int64), minlength=_BINS)


def find_cut(rank: int, low: int, high: int, count: Callable[[int, int], NDArray[np.int64]]) -> Cut:
    """The cut before the sample of this rank (from 0), where all targets lie in [low, high].

    `count(low, width)` is the `histogram` over all blocks. At most 4 calls, 2 for a few decades in seconds, and
    no more memory than one histogram, however many samples there are.
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
    """The cut as each block counts it, where `tied[b]` targets of block b are at the cut's very time."""
    left = cut.ties - (np.cumsum(tied) - np.asarray(tied))
    return [Cut(cut.at, int(ties)) for ties in np.clip(left, 0, tied)]
