from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from l2d_ray.data.histories import Lists
from l2d_ray.data.splits import (
    SHARES,
    Cut,
    by_time,
    find_cut,
    histogram,
    leave_one_out,
    share_ties,
    target_times,
)
from l2d_ray.schema import Split

NONE, TRAIN, VALID, TEST = (int(split) for split in Split)
INT64 = st.integers(-(2**63), 2**63 - 1)
TIMES = st.one_of(st.integers(0, 5), st.integers(0, 10**9), INT64)
USERS = st.lists(st.lists(TIMES, min_size=1, max_size=12).map(sorted), min_size=1, max_size=12)


def lists_of(users: Sequence[Sequence[int]]) -> Lists:
    flat = np.array([time for user in users for time in user], dtype=np.int64)
    return Lists(flat, np.cumsum([0, *(len(user) for user in users)]))


def split_by_time(blocks: list[Lists]) -> list[NDArray[np.int8]]:
    """Split as `distributed.prepare` does, but in one process."""
    targets = [target_times(block) for block in blocks]
    samples = np.concatenate(targets)
    if not len(samples):
        return [by_time(block, []) for block in blocks]
    of_blocks: list[list[Cut]] = [[] for _ in blocks]
    for share in SHARES:
        rank, low, high = int(share * len(samples)), int(samples.min()), int(samples.max())
        cut = find_cut(rank, low, high, lambda low, width: sum(histogram(t, low, width) for t in targets))
        for cuts, shared in zip(of_blocks, share_ties(cut, [int((t == cut.at).sum()) for t in targets]), strict=True):
            cuts.append(shared)
    return [by_time(block, cuts) for block, cuts in zip(blocks, of_blocks, strict=True)]


def naive(users: Sequence[Sequence[int]]) -> list[list[int]]:
    samples = sorted((user[p], u, p) for u, user in enumerate(users) for p in range(1, len(user)))
    splits = [[NONE] * len(user) for user in users]
    for rank, (_, u, p) in enumerate(samples):
        valid, test = (rank >= int(share * len(samples)) for share in SHARES)
        splits[u][p] = TRAIN + valid + test
    return splits


@given(USERS, st.integers(0, 12))
def test_the_time_split_equals_one_global_sort(users: list[list[int]], at: int) -> None:
    blocks = [lists_of(users[:at]), lists_of(users[at:])]
    assert np.concatenate(split_by_time(blocks)).tolist() == [split for user in naive(users) for split in user]


@given(USERS)
def test_no_training_history_has_a_target_of_a_later_split(users: list[list[int]]) -> None:
    block = lists_of(users)
    for splits in (split_by_time([block])[0], leave_one_out(block)):
        for u in range(len(users)):
            of_user = splits[block.offsets[u] : block.offsets[u + 1]]
            assert of_user[0] == NONE
            assert (np.diff(of_user[1:]) >= 0).all()
            assert NONE not in of_user[1:]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [NONE]),
        (2, [NONE, TEST]),
        (3, [NONE, VALID, TEST]),
        (5, [NONE, TRAIN, TRAIN, VALID, TEST]),
    ],
)
def test_leave_one_out_takes_the_last_two(length: int, expected: list[int]) -> None:
    users = [list(range(length)), [0, 1, 2]]
    assert leave_one_out(lists_of(users)).tolist() == [*expected, NONE, VALID, TEST]


def test_the_shares_are_cut_at_whole_samples() -> None:
    users = [[0] * 8, [0] * 12]
    splits = split_by_time([lists_of(users)])[0]
    assert np.bincount(splits).tolist() == [2, 14, 2, 2]
    assert splits.tolist() == [NONE, *[TRAIN] * 7, NONE, *[TRAIN] * 7, VALID, VALID, TEST, TEST]


@pytest.mark.parametrize(("span", "calls"), [(0, 0), (2**16 - 1, 1), (20 * 366 * 86_400, 2), (2**64 - 1, 4)])
def test_a_cut_is_found_in_few_passes(span: int, calls: int) -> None:
    low = -(2**63)
    times = np.array([low, low + span // 2, low + span], dtype=np.int64)
    calls_made = []

    def count(low: int, width: int) -> NDArray[np.int64]:
        calls_made.append((low, width))
        return histogram(times, low, width)

    expected = Cut(low, 1) if span == 0 else Cut(low + span // 2, 0)
    assert find_cut(1, low, low + span, count) == expected
    assert len(calls_made) == calls


def test_ties_are_shared_in_the_order_of_the_blocks() -> None:
    assert share_ties(Cut(9, 5), [3, 0, 4, 2]) == [Cut(9, 3), Cut(9, 0), Cut(9, 2), Cut(9, 0)]
