from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from l2d_ray.data.histories import BLOCK, Lists, as_lists, group, item_counts, range_boundaries, select
from l2d_ray.data.interactions import READ, user_hashes

Pair = tuple[str, int]


def interactions(rows: list[tuple[str, int, int, int, int]]) -> pa.Table:
    """Return rows of (user, item, timestamp, file, row) as a block of READ."""
    users, items, times, files, numbers = (list(column) for column in zip(*rows, strict=True))
    hashes = user_hashes(pa.array(users))
    return pa.table([users, hashes, items, times, files, numbers], schema=READ)


def pairs(block: pa.Table) -> list[Pair]:
    return [(row["user_id"], item) for row in block.to_pylist() for item in row["item_indices"]]


def naive_core(kept: list[Pair], k: int) -> list[Pair]:
    while True:
        users, items = Counter(user for user, _ in kept), Counter(item for _, item in kept)
        smaller = [(user, item) for user, item in kept if users[user] >= k and items[item] >= k]
        if len(smaller) == len(kept):
            return kept
        kept = smaller


def core(blocks: list[pa.Table], candidates: int, k: int) -> list[pa.Table]:
    stays = np.ones(candidates, dtype=np.bool_)
    while True:
        counts = np.zeros(candidates, dtype=np.int64)
        for block in blocks:
            items, found = item_counts(block, stays, k)
            counts[items] += found
        if np.array_equal(stays, counts >= k):
            return [select(block, stays, k) for block in blocks]
        stays = counts >= k


def test_ranges_cover_all_hashes_in_order() -> None:
    assert range_boundaries(1) == []
    assert range_boundaries(4) == [-(2**62), 0, 2**62]
    bounds = [-(2**63), *range_boundaries(7), 2**63]
    assert max(np.diff(np.array(bounds, dtype=object))) - min(np.diff(np.array(bounds, dtype=object))) <= 1


def test_histories_are_in_time_order_and_ties_in_input_order() -> None:
    rows = [("u", 5, 10, 1, 1), ("u", 4, 10, 0, 9), ("u", 3, 10, 0, 8), ("u", 2, 5, 2, 1), ("u", 1, 11, 0, 1)]
    assert group(interactions(rows)).to_pylist() == [
        {
            "user_id": "u",
            "user_hash": user_hashes(pa.array(["u"]))[0],
            "item_indices": [2, 3, 4, 5, 1],
            "timestamps": [5, 10, 10, 10, 11],
        }
    ]


def test_users_are_in_order_of_their_hash_and_then_their_id() -> None:
    rows = [(user, 0, 1, 0, row) for row, user in enumerate("zyxwvu")]
    block = group(interactions(rows))
    assert block["user_hash"].to_pylist() == sorted(block["user_hash"].to_pylist())
    collided = interactions(rows).set_column(1, "user_hash", pa.array([7] * 6))
    assert group(collided)["user_id"].to_pylist() == list("uvwxyz")


def test_an_empty_block_stays_empty() -> None:
    empty = group(READ.empty_table())
    assert empty.schema == BLOCK
    assert len(empty) == 0
    stays = np.ones(3, dtype=np.bool_)
    assert item_counts(empty, stays, 2)[0].tolist() == []
    assert len(select(empty, stays, 2)) == 0


def test_the_flat_view_of_a_slice_starts_at_zero() -> None:
    column = pa.chunked_array([as_lists(np.array([0, 2, 5]), np.arange(5), pa.int32())]).slice(1)
    lists = Lists.of(column)
    assert (lists.values.tolist(), lists.offsets.tolist()) == ([2, 3, 4], [0, 3])
    assert lists.positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_core_equals_a_naive_reference(seed: int, k: int) -> None:
    random = np.random.default_rng(seed)
    number = 600
    users, items = random.zipf(1.5, number) % 90, random.zipf(1.5, number) % 60
    rows = [(f"u{u}", int(i), int(random.integers(9)), 0, n) for n, (u, i) in enumerate(zip(users, items, strict=True))]
    block = group(interactions(rows))
    blocks = [block.slice(0, 20), block.slice(20, 0), block.slice(20)]
    expected = naive_core(pairs(block), k)
    assert [pair for part in core(blocks, 60, k) for pair in pairs(part)] == expected
    assert len(expected) > 0


def test_timestamps_stay_with_their_items() -> None:
    block = group(interactions([("u", item, 100 + item, 0, item) for item in range(6)]))
    stays = np.array([True, False, True, False, True, False])
    (row,) = select(block, stays, 3).to_pylist()
    assert (row["item_indices"], row["timestamps"]) == ([0, 2, 4], [100, 102, 104])
    assert len(select(block, stays, 4)) == 0


def test_a_history_of_50_000_items() -> None:
    number = 50_000
    block = group(interactions([("u", item, number - item, 0, item) for item in range(number)]))
    (row,) = core([block], number, 1)[0].to_pylist()
    assert row["item_indices"] == list(range(number))[::-1]
