"""Counts of transitions against loops, over one user after the other and over any number of shards."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.l2d_definitions import prior, transition_counts

from l2d_ray.core.posterior import FLOOR, Parameters
from l2d_ray.core.transition_counts import TransitionCounts
from l2d_ray.core.transitions import Mixture, Transitions, last_items
from l2d_ray.data.samples import TrainingInteractions

NUM_ITEMS = 12
HISTORIES = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=25), max_size=8)


def interactions(histories: list[list[int]]) -> TrainingInteractions:
    """Return training interactions in which every item but the first is a target."""
    offsets = np.cumsum([0, *map(len, histories)])
    items = np.array([item for history in histories for item in history], np.int32)
    is_target = np.ones(items.size, np.bool_)
    is_target[offsets[:-1]] = False
    return TrainingInteractions(items, np.zeros(items.size, np.int64), offsets, is_target)


def daily(histories: list[list[int]], first_day: int) -> TrainingInteractions:
    """Return the same with an item of each history a day."""
    found = interactions(histories)
    return replace(found, timestamps=86_400 * (first_day + found.positions))


def count(histories: list[list[int]], targets: list[int] | None = None, num_items: int = NUM_ITEMS) -> TransitionCounts:
    targets_V = np.arange(num_items) if targets is None else np.array(targets, np.int64)
    return TransitionCounts.count([interactions(histories)], num_items, targets_V)


@given(HISTORIES, st.floats(0.05, 1))
@settings(max_examples=25, deadline=None)
def test_the_counts_are_those_of_a_loop(histories: list[list[int]], lag_decay: float) -> None:
    expected = transition_counts(histories, NUM_ITEMS, lag_decay)
    transitions = count(histories).weigh(lag_decay)
    np.testing.assert_allclose(transitions.counts_IV.toarray(), expected, rtol=1e-12)
    np.testing.assert_allclose(transitions.totals_I, expected.sum(axis=1), rtol=1e-12)


@given(HISTORIES, st.lists(st.one_of(st.integers(0, NUM_ITEMS - 1), st.just("unknown")), min_size=1, max_size=15))
@settings(max_examples=25, deadline=None)
def test_probabilities_are_those_of_the_formula_and_add_up_to_one(
    histories: list[list[int]], history: list[int | str]
) -> None:
    parameters = Parameters(age_decay=0.6, lag_decay=0.7, smoothing=3)
    found = count(histories).weigh(parameters.lag_decay, FLOOR).probabilities(history, parameters.mixture)
    np.testing.assert_allclose(found, prior(histories, NUM_ITEMS, history, parameters), rtol=1e-9)
    assert found.sum() == pytest.approx(1)
    assert (found > 0).all()


@given(HISTORIES, HISTORIES)
@settings(max_examples=25, deadline=None)
def test_counts_of_a_dataset_that_grew_by_users_and_items_are_those_of_the_whole(
    some: list[list[int]], others: list[list[int]]
) -> None:
    """They are equal to the last bit. Every second item is a target."""
    later = [[item + 3 for item in history] for history in others]
    targets = list(range(0, NUM_ITEMS + 3, 2))
    older = count(some, [target for target in targets if target < NUM_ITEMS])
    grown = count(later, targets, NUM_ITEMS + 3).plus(older)
    for name, whole in vars(count(some + later, targets, NUM_ITEMS + 3)).items():
        np.testing.assert_array_equal(getattr(grown, name), whole)
        assert np.asarray(getattr(grown, name)).dtype == np.asarray(whole).dtype


@given(HISTORIES, HISTORIES, st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_counts_with_a_half_life_add_up_and_an_infinite_one_changes_nothing(
    some: list[list[int]], others: list[list[int]], first_day: int
) -> None:
    parts, targets_V = [daily(some, 4), daily(others, first_day)], np.arange(NUM_ITEMS)
    at_once = TransitionCounts.count(parts, NUM_ITEMS, targets_V, half_life_days=2.5)
    older, newer = (TransitionCounts.count([part], NUM_ITEMS, targets_V, half_life_days=2.5) for part in parts)
    grown = newer.plus(older)
    for name in ("starts_I", "places_P", "counts_LP", "totals_LI", "samples_V", "samples"):
        np.testing.assert_allclose(getattr(grown, name), getattr(at_once, name), rtol=1e-6)
    days = np.concatenate([part.timestamps[part.is_target] // 86_400 for part in parts])
    if days.size:
        assert grown.newest_day == days.max()
        assert at_once.samples == pytest.approx((0.5 ** ((days.max() - days) / 2.5)).sum())
    infinite = TransitionCounts.count(parts, NUM_ITEMS, targets_V, half_life_days=np.inf)
    plain = TransitionCounts.count(parts, NUM_ITEMS, targets_V)
    for name in ("starts_I", "places_P", "counts_LP", "totals_LI", "samples_V", "samples"):
        np.testing.assert_array_equal(getattr(infinite, name), getattr(plain, name))


@given(HISTORIES, HISTORIES, st.lists(st.integers(0, 2), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
@settings(max_examples=25, deadline=None)
def test_counts_over_shards_and_over_users_are_those_of_the_whole(
    some: list[list[int]], others: list[list[int]], shard_of: list[int]
) -> None:
    """They are equal to the last bit."""
    whole = count(some + others)
    parts = [interactions(some), interactions(others)]
    targets = [np.flatnonzero(np.array(shard_of) == shard) for shard in range(3)]
    shards = [TransitionCounts.count(parts, NUM_ITEMS, targets_V) for targets_V in targets]
    history, mixture = [3, 4, "unknown", 3], Mixture()
    expected = whole.weigh(0.8, FLOOR).probabilities(history, mixture)
    for shard, targets_V in zip(shards, targets, strict=True):
        np.testing.assert_array_equal(shard.weigh(0.8, FLOOR).probabilities(history, mixture), expected[targets_V])
    joined = TransitionCounts.join(shards, np.arange(NUM_ITEMS))
    for name, array in vars(whole).items():
        np.testing.assert_array_equal(getattr(joined, name), array)


def test_joined_counts_of_some_items_have_their_pairs_only() -> None:
    histories = [[0, 1, 2, 3], [1, 3, 0]]
    shards = [count(histories, targets, 4) for targets in ([0, 2], [1, 3])]
    joined = TransitionCounts.join(shards, np.array([1])).weigh(0.5)
    np.testing.assert_array_equal(joined.counts_IV.toarray()[1], [0.5, 0, 1, 1.5])
    assert joined.counts_IV.toarray()[[0, 2, 3]].sum() == 0


@given(HISTORIES, st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=14), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_many_histories_are_answered_as_each_alone(training: list[list[int]], histories: list[list[int]]) -> None:
    transitions: Transitions = count(training).weigh(0.9, FLOOR)
    together = transitions.probabilities_after(last_items(histories), Mixture())
    for found, history in zip(together, histories, strict=True):
        np.testing.assert_allclose(found, transitions.probabilities(history, Mixture()), rtol=1e-12)


def test_without_samples_every_item_is_as_likely() -> None:
    transitions = count([], num_items=5).weigh(0.8, FLOOR)
    np.testing.assert_allclose(transitions.probabilities([3, "unknown"], Mixture()), np.full(5, 0.2))
    assert count([], num_items=5).weigh(0.8).popularity_V.tolist() == [0] * 5


def test_the_only_item_of_a_catalogue_is_certain() -> None:
    transitions = count([[0, 0, 0]], num_items=1).weigh(0.8, FLOOR)
    np.testing.assert_allclose(transitions.probabilities([0], Mixture()), [1])
    np.testing.assert_allclose(transitions.probabilities_after(last_items([[0], [0, 0]]), Mixture()), [[1], [1]])
