import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from l2d_ray.core.moments import Moments, item_sums

SEEDS = st.integers(0, 2**32 - 1)


def test_the_sum_of_an_item_is_over_its_rows() -> None:
    states = np.array([[1, 2], [3, 4], [0, 1]], np.float16)
    sums, counts = item_sums(states, np.array([2, 2, 0]), num_items=3)
    assert sums.tolist() == [[0, 1], [0, 0], [4, 6]]
    assert counts.tolist() == [1, 0, 2]


def test_large_float16_sums_do_not_overflow() -> None:
    sums, _ = item_sums(np.full((100, 1), 60_000, np.float16), np.zeros(100, np.int64), 1)
    assert sums.item() == 100 * np.float64(np.float16(60_000))


@given(st.integers(1, 20), st.integers(0, 20), SEEDS)
def test_the_sums_of_two_memories_add_up_to_the_sums_of_both(rows: int, cut: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    states, items = random.standard_normal((rows, 3)).astype(np.float16), random.integers(0, 4, rows)
    whole = item_sums(states, items, 4)
    parts = item_sums(states[:cut], items[:cut], 4), item_sums(states[cut:], items[cut:], 4)
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0])
    np.testing.assert_array_equal(parts[0][1] + parts[1][1], whole[1])


@given(st.integers(1, 30), st.integers(1, 6), SEEDS)
def test_the_moments_of_shards_add_up_to_the_moments_of_the_memory(rows: int, num_items: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    states, items = random.standard_normal((rows, 3)), random.integers(0, num_items, rows)
    whole = Moments.of_rows(states) + Moments.of_items(*item_sums(states, items, num_items))
    merged = Moments.zero(3)
    for shard in range(2):
        part = items % 2 == shard
        merged += Moments.of_rows(states[part]) + Moments.of_items(*item_sums(states[part], items[part], num_items))
    assert (merged.rows, merged.items) == (whole.rows, whole.items) == (rows, np.unique(items).size)
    for name in ("sum_D", "outer_DD", "item_outer_DD"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), atol=1e-12)
