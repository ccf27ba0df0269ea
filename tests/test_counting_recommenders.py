"""Recommenders that count interactions, against their definitions written out as loops, and against known answers."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.small_workspace import ITEM_COUNT, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.core.times import SECONDS_PER_DAY, units_per_second
from l2d_ray.core.transitions import PLACES
from l2d_ray.data.samples import TrainingInteractions, training_interactions
from l2d_ray.errors import InputError
from l2d_ray.recommenders.ease import Ease, EaseOptions, Gram
from l2d_ray.recommenders.popularity_window import Events, PopularityWindow
from l2d_ray.recommenders.registry import find
from l2d_ray.recommenders.title_knn import TitleKnn, of_length_one
from l2d_ray.recommenders.transitions import DECAY, MIXTURE, TransitionRecommender

NOTHING = TrainingInteractions(np.empty(0, np.int32), np.empty(0, int), np.zeros(1, int), np.empty(0, bool))


@pytest.fixture(scope="module")
def interactions(tmp_path_factory: pytest.TempPathFactory) -> TrainingInteractions:
    return training_interactions(write_dataset(tmp_path_factory.mktemp("dataset"), users=50, length=16))


def histories(interactions: TrainingInteractions) -> list[list[int]]:
    return [part.tolist() for part in np.split(interactions.items, interactions.offsets[1:-1])]


def answers(recommender: Any, *queries: Query) -> list[list[int]]:
    return [found.items_I.tolist() for found in recommender.recommend(queries)]


def windowed(days: int, *events: tuple[float, int], num_items: int = 5) -> PopularityWindow:
    """Return the recommender of targets at some days."""
    times, items = zip(*events, strict=True)
    seconds = (np.array(times) * SECONDS_PER_DAY).astype(np.int64)
    return PopularityWindow.over(Events.of(seconds, np.array(items, np.int32)), num_items, days)


def at(day: float | None, **options: Any) -> Query:
    return Query([0], 5, timestamp=None if day is None else int(day * SECONDS_PER_DAY), **options)


def test_items_of_the_window_come_first_and_earlier_ones_complete_the_list() -> None:
    recommender = windowed(7, (9, 1), (0, 2), (0, 2), (1, 2), (0, 4), (1, 4), (8, 3), (9, 3))
    assert answers(recommender, at(10), at(2), at(None), at(100)) == [[3, 1, 2, 4], [2, 4], [3, 1, 2, 4], [2, 3, 4, 1]]
    (found,) = recommender.recommend([at(10)])
    np.testing.assert_allclose(found.scores_I, [2 + 2 / 9, 1 + 1 / 9, 3 / 9, 2 / 9])


def test_a_sample_at_the_moment_of_the_query_or_later_never_counts() -> None:
    recommender = windowed(7, (1, 1), (5, 2), (5, 2), (9, 3), (9, 3), (9, 3))
    assert answers(recommender, at(9), at(5), at(1), at(0)) == [[2, 1], [1], [], []]
    assert answers(recommender, at(5.1), at(9.1)) == [[2, 1], [3, 2, 1]]


def test_the_window_begins_with_its_first_moment() -> None:
    recommender = windowed(7, (3, 1), (2.9, 2), (2.9, 2))
    assert answers(recommender, at(10)) == [[1, 2]]


@pytest.mark.parametrize(
    ("newest", "units"),
    [(0, 1), (893_286_638, 1), (893_286_638_000, 1_000), (893_286_638 * 10**6, 10**6), (893_286_638 * 10**9, 10**9)],
)
def test_the_unit_of_the_times_is_known_by_their_size(newest: int, units: int) -> None:
    assert units_per_second(newest) == units
    events = Events.of(np.array([newest]), np.array([0], np.int32))
    assert PopularityWindow.over(events, 1, 7).window == 7 * SECONDS_PER_DAY * units


def test_transitions_are_the_mixture_that_the_formula_says(interactions: TrainingInteractions) -> None:
    counts, popularity = np.zeros((ITEM_COUNT, ITEM_COUNT)), np.zeros(ITEM_COUNT)
    for history in histories(interactions):
        for place in range(1, len(history)):
            popularity[history[place]] += 1
            for lag in range(1, min(place, PLACES) + 1):
                counts[history[place - lag], history[place]] += DECAY ** (lag - 1)
    popularity /= popularity.sum()
    fitted = TransitionRecommender.fit(interactions, ITEM_COUNT)
    np.testing.assert_allclose(fitted.transitions.counts_IV.toarray(), counts)
    for history in ([3], [4, 4, 9], [*range(14), 2]):
        expected, weights = np.zeros(ITEM_COUNT), 0.0
        for age, item in enumerate(history[::-1][:PLACES]):
            smoothed = (counts[item] + MIXTURE.smoothing * popularity) / (counts[item].sum() + MIXTURE.smoothing)
            expected, weights = expected + DECAY**age * smoothed, weights + DECAY**age
        (found,) = fitted.recommend([Query(history, ITEM_COUNT)])
        np.testing.assert_allclose(found.scores_I, (expected / weights)[found.items_I])
        assert found.items_I.tolist() == np.argsort(-expected, kind="stable").tolist()
        assert found.scores_I.sum() == pytest.approx(1)


def test_a_title_that_nobody_knows_is_followed_by_what_is_popular(interactions: TrainingInteractions) -> None:
    fitted = TransitionRecommender.fit(interactions, ITEM_COUNT)
    np.testing.assert_allclose(fitted.probabilities(["unknown"]), fitted.transitions.popularity_V)
    mixed = (fitted.transitions.popularity_V + DECAY * fitted.probabilities([7])) / (1 + DECAY)
    np.testing.assert_allclose(fitted.probabilities([7, "unknown"]), mixed)


@pytest.mark.parametrize("ridge", [1, 250])
def test_ease_minimises_its_objective(interactions: TrainingInteractions, ridge: int) -> None:
    """At the minimum the gradient is zero, but for the diagonal, which is fixed at zero."""
    matrix = np.zeros((50, ITEM_COUNT))
    for user, history in enumerate(histories(interactions)):
        matrix[user, history] = 1
    before = interactions.items.copy()
    gram = Gram.of(interactions, ITEM_COUNT)
    assert interactions.items.tolist() == before.tolist()
    np.testing.assert_array_equal(gram.gram_II, matrix.T @ matrix)
    weights = Ease.fit(gram, ridge).weights_II.astype(np.float64)
    gradient = matrix.T @ (matrix @ weights - matrix) + ridge * weights
    assert (np.diag(weights) == 0).all()
    np.testing.assert_allclose(gradient - np.diag(np.diag(gradient)), 0, atol=1e-4)
    (found,) = Ease.fit(gram, ridge).recommend([Query([3, 8, 3], ITEM_COUNT)])
    np.testing.assert_allclose(found.scores_I, (weights[3] + weights[8])[found.items_I], rtol=1e-6)


def test_ease_counts_the_first_item_of_a_history_and_no_item_after_the_training_targets() -> None:
    items, offsets = np.array([0, 1, 0, 2], np.int32), np.array([0, 2, 4])
    training = TrainingInteractions(items, np.arange(4), offsets, np.array([False, True, False, True]))
    gram = Gram.of(training, 5)
    assert gram.gram_II[0].tolist() == [2, 1, 1, 0, 0]
    assert answers(Ease.fit(gram, 1), Query([1], 5), Query(["unknown"], 5)) == [[0, 1, 2], [0, 1, 2]]


def test_a_catalogue_too_large_for_ease_is_refused() -> None:
    class Large:
        def items(self) -> pa.Table:
            return pa.table({"item_id": pa.nulls(40_000, pa.string())})

    with pytest.raises(InputError, match=r"^ease: 40,000 items need 32 GB of memory, and at most 30,000 are accepted"):
        EaseOptions(stated=False, ridge=250).check(Large(), [])  # type: ignore[arg-type]


def test_title_knn_looks_at_the_mean_of_the_last_items() -> None:
    states = np.array([[2, 0], [0, 3], [1, 1], [-1, 0]], np.float32)
    assert answers(TitleKnn(of_length_one(states), 1), Query([1, 0], 4)) == [[0, 2, 1, 3]]
    assert answers(TitleKnn(of_length_one(states), 2), Query([3, 1, 0], 4)) == [[2, 0, 1, 3]]
    assert answers(TitleKnn(of_length_one(states), 1), Query([0, "unknown"], 1), Query(["unknown"], 1)) == [[0], []]
    (found,) = TitleKnn(of_length_one(states), 1).recommend([Query([0], 4)])
    np.testing.assert_allclose(found.scores_I, [1, 0.5**0.5, 0, -1], atol=1e-6)


def test_recommenders_without_any_training_sample_recommend_nothing() -> None:
    events = Events.of(NOTHING.target_timestamps, NOTHING.targets)
    for empty in (
        PopularityWindow.over(events, 3, 7),
        TransitionRecommender.fit(NOTHING, 3),
        Ease.fit(Gram.of(NOTHING, 3), 1),
    ):
        assert answers(empty, Query([1], 3)) == [[]]


@pytest.mark.parametrize(
    ("name", "tuned", "values"),
    [
        ("popularity-window", "days", [7, 30]),
        ("ease", "ridge", [50, 100, 250, 500, 1000]),
        ("title-knn", "last_items", [1, 3, 10]),
    ],
)
def test_a_name_without_a_number_leaves_it_to_validation(name: str, tuned: str, values: list[int]) -> None:
    options = find(name, Config(), "name").options
    (study,) = options.studies(Config())
    assert [getattr(trial, tuned) for trial in study.trials] == values
    assert study.default in values
    assert getattr(options.chosen({name: {tuned: 3}}), tuned) == 3
    stated = find(f"{name}-77", Config(), "name").options
    assert (getattr(stated, tuned), stated.studies(Config()), stated.chosen({})) == (77, [], stated)
