import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from l2d_ray.core.decoding import global_scores, item_sums, top_k


def test_an_item_is_the_mean_of_its_rows() -> None:
    states = np.array([[1, 2], [3, 4], [0, 1]], np.float16)
    sums, counts = item_sums(states, np.array([2, 2, 0]), num_items=3)
    assert sums.tolist() == [[0, 1], [0, 0], [4, 6]]
    assert counts.tolist() == [1, 0, 2]
    scores = global_scores(np.array([[2.0, 3.0], [0.0, 4.0]]), sums, counts)
    np.testing.assert_allclose(scores, [[1 / np.sqrt(8), -np.inf, np.inf], [1 / 3, -np.inf, 1 / np.sqrt(5)]])


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_sums_of_two_memories_add_up_to_those_of_both(rows: int, cut: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    states, items = random.standard_normal((rows, 3)).astype(np.float16), random.integers(0, 4, rows)
    whole = item_sums(states, items, 4)
    parts = item_sums(states[:cut], items[:cut], 4), item_sums(states[cut:], items[cut:], 4)
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0])
    np.testing.assert_array_equal(parts[0][1] + parts[1][1], whole[1])


def test_equal_scores_are_ordered_by_item() -> None:
    items, scores = top_k(np.array([[1.0, 3.0, 1.0, 3.0, -np.inf]]), k=4)
    assert items.tolist() == [[1, 3, 0, 2]]
    assert scores.tolist() == [[3, 3, 1, 1]]


def test_more_results_than_items_are_all_items() -> None:
    items, _ = top_k(np.array([[1.0, 2.0]]), k=10)
    assert items.tolist() == [[1, 0]]
