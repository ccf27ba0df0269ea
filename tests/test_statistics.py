"""The paired ratio against figures by hand, against scipy's own bootstrap of a ratio, and its properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from l2d_ray.core.statistics import Ratio, paired_ratio

USERS = np.arange(400)


def hits(share: float, seed: int = 0, count: int = 400) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < share).astype(float)


def test_the_ratio_is_that_of_the_means() -> None:
    found = paired_ratio(np.array([1.0, 1, 0, 1]), np.array([1.0, 0, 1, 0]), np.arange(4))
    assert found.value == 1.5


def test_two_users_have_three_outcomes() -> None:
    """Four draws are equally likely: one has the first user alone (2 / 1), one the second alone (1 / 2)."""
    found = paired_ratio(np.array([2.0, 1.0]), np.array([1.0, 2.0]), np.array([7, 9]))
    assert found.value == 1
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(2))
    assert found.above is False


def test_the_interval_is_that_of_the_ratio_itself() -> None:
    ours, theirs = hits(0.4), hits(0.3, seed=1)
    found = paired_ratio(ours, theirs, USERS)
    expected = stats.bootstrap(
        (ours, theirs),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        batch=1000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    assert found.low == pytest.approx(expected.low, rel=0.02)
    assert found.high == pytest.approx(expected.high, rel=0.02)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_a_recommender_is_level_with_itself(samples: list[tuple[int, bool]]) -> None:
    users, found = (np.array(column) for column in zip(*samples, strict=True))
    ratio = paired_ratio(found.astype(float), found.astype(float), users)
    if not found.any():
        assert ratio == Ratio(None, None, None)
    elif len(set(users.tolist())) < 2:
        assert ratio == Ratio(1, None, None)
    else:
        assert ratio == Ratio(1, 1, 1)
    assert ratio.above in (None, False)


def test_pairs_decide_and_not_the_two_means_alone() -> None:
    """One that finds all the other finds, and a little more, is above; by independent samples it would not be."""
    theirs = hits(0.3)
    ours = np.maximum(theirs, hits(0.03, seed=2))
    assert paired_ratio(ours, theirs, USERS).above
    assert not paired_ratio(np.random.default_rng(3).permutation(ours), theirs, USERS).above
    assert paired_ratio(theirs, ours, USERS).above is False


def test_users_are_drawn_and_not_samples() -> None:
    """Ten equal samples of a user are worth one."""
    ours, theirs = hits(0.4), hits(0.3, seed=1)
    once = paired_ratio(ours, theirs, USERS)
    ten = paired_ratio(np.repeat(ours, 10), np.repeat(theirs, 10), np.repeat(USERS, 10))
    assert ten == once
    independent = paired_ratio(np.repeat(ours, 10), np.repeat(theirs, 10), np.arange(4000))
    assert independent.high is not None
    assert ten.high is not None
    assert independent.high < ten.high


def test_what_is_undefined_is_none() -> None:
    none, some = np.zeros(400), hits(0.3)
    assert paired_ratio(none, none, USERS) == Ratio(None, None, None)
    against_nothing = paired_ratio(some, none, USERS)
    assert (against_nothing, against_nothing.above) == (Ratio(None, None, None), None)
    assert paired_ratio(none, some, USERS) == Ratio(0, 0, 0)
    one_user = paired_ratio(some, some, np.zeros(400, np.int64))
    assert (one_user, one_user.above) == (Ratio(1, None, None), None)


def test_an_interval_may_have_no_upper_end() -> None:
    """One user in 400 has the only hit of the other recommender, so that over a third of the draws have none."""
    single = np.zeros(400)
    single[3] = 1
    found = paired_ratio(hits(0.3), single, USERS)
    assert found.high is None
    assert found.above
