import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from l2d_ray.core.samples import in_fraction, item_shards, sample_ids, window_starts

MILLION = sample_ids(np.repeat(np.arange(1000) * 7_919 - 500_000, 1000), np.tile(np.arange(1, 1001), 1000))


@given(st.integers(0, 100_000), st.integers(1, 50), st.integers(1, 50))
def test_a_window_has_max_items_to_max_items_plus_stride_less_one(position: int, max_items: int, stride: int) -> None:
    (start,) = window_starts(np.array([position]), max_items, stride).tolist()
    assert start % stride == 0
    if position < max_items:
        assert start == 0
    else:
        assert max_items <= position - start <= max_items + stride - 1


@given(st.integers(1, 50), st.integers(1, 50))
def test_the_left_edge_moves_forward_in_steps_of_the_stride(max_items: int, stride: int) -> None:
    steps = np.diff(window_starts(np.arange(300), max_items, stride))
    assert set(steps.tolist()) <= {0, stride}


def test_a_stride_of_one_is_the_last_n_items() -> None:
    assert window_starts(np.arange(6), 3, 1).tolist() == [0, 0, 0, 0, 1, 2]


def test_a_window_of_ten_in_steps_of_ten() -> None:
    positions = np.array([0, 9, 10, 19, 20, 29, 30])
    assert window_starts(positions, 10, 10).tolist() == [0, 0, 0, 0, 10, 10, 20]


def test_a_million_samples_have_a_million_ids() -> None:
    assert np.unique(MILLION).size == 1_000_000


def test_an_id_depends_on_the_user_and_the_position() -> None:
    users, positions = np.array([1, 2, 1]), np.array([2, 1, 2])
    first, swapped, again = sample_ids(users, positions).tolist()
    assert first == again != swapped


def test_a_smaller_share_is_a_subset_of_a_larger_one() -> None:
    small, large = in_fraction(MILLION, 0.3), in_fraction(MILLION, 0.5)
    assert not (small & ~large).any()
    assert abs(small.mean() - 0.3) < 0.003
    assert abs(large.mean() - 0.5) < 0.003
    assert in_fraction(MILLION, 1.0).all()


def test_items_are_spread_evenly_and_each_has_one_shard() -> None:
    items = np.arange(100_000, dtype=np.int32)
    shards = item_shards(items, 7)
    assert np.bincount(shards, minlength=7).min() > 0.95 * 100_000 / 7
    assert (item_shards(items[::-1], 7) == shards[::-1]).all()
    assert set(item_shards(items[:50], 1).tolist()) == {0}


def test_hashes_are_fixed() -> None:
    """Memories on disk have these ids; new memories must have the same."""
    users = np.array([0, 1, -1, 2**62], np.int64)
    ids = sample_ids(users, np.array([1, 1, 2, 50_000]))
    assert ids.tolist() == [
        8_841_707_400_507_832_957,
        -8_940_656_346_802_403_830,
        -6_104_785_309_571_768_869,
        -8_428_675_411_765_751_813,
    ]
    assert in_fraction(ids, 0.5).tolist() == [True, False, False, False]
    assert item_shards(np.array([0, 1, 2, 3, 10_000], np.int32), 4).tolist() == [0, 1, 2, 0, 0]
