"""The transition-graph heuristic, against its definition written out as loops, and against known answers."""

from itertools import pairwise

import numpy as np
import pytest

from l2d_ray.config import Config
from l2d_ray.core.query import Query
from l2d_ray.data.samples import TrainingInteractions
from l2d_ray.recommenders.registry import find
from l2d_ray.recommenders.tgh import BUDGETS, EDGE_WEIGHT, TransitionRings, rings, transition_graph
from l2d_ray.recommenders.title_knn import of_length_one

ITEMS = 25


def interactions(*histories: list[int]) -> TrainingInteractions:
    """Return histories, of which every item but the first is a training target."""
    items = np.array([item for history in histories for item in history], np.int32)
    offsets = np.cumsum([0, *map(len, histories)])
    is_target = np.ones(items.size, np.bool_)
    is_target[offsets[:-1][np.diff(offsets) > 0]] = False
    return TrainingInteractions(items, np.arange(items.size), offsets, is_target)


def directions(num_items: int, seed: int = 0) -> np.ndarray:
    return of_length_one(np.random.default_rng(seed).normal(size=(num_items, 6)).astype(np.float32))


def expected_scores(histories: list[list[int]], titles: np.ndarray, sources: list[int], budgets: tuple) -> list[float]:
    """Return the score of each item by the module's docstring."""
    num_items = len(titles)
    counts = np.zeros((num_items, num_items))
    for history in histories:
        for item, following in pairwise(history):
            counts[item, following] += 1
    scores = [float(titles[sources[0]] @ titles[item]) - 1 for item in range(num_items)]
    for source, of_rings in zip(sources, budgets, strict=False):
        ring, near = {source}, set()
        for number, budget in enumerate(of_rings):
            ring = {following for item in ring for following in np.flatnonzero(counts[item]).tolist()} - near
            near |= ring | {source}

            def similarity(item: int, source: int = source, first: bool = number == 0) -> float:
                weights = np.log1p(counts[source])
                bonus = EDGE_WEIGHT * weights[item] / weights.max() if first else 0.0
                return float(titles[source] @ titles[item]) + bonus

            for rank, item in enumerate(sorted(ring, key=similarity, reverse=True), start=1):
                scores[item] = max(scores[item], budget / rank)
    return scores


@pytest.mark.parametrize("sources", BUDGETS)
def test_scores_are_those_of_the_definition(sources: int) -> None:
    random = np.random.default_rng(1)
    histories = random.integers(0, ITEMS, (12, 6)).tolist()
    titles = directions(ITEMS)
    recommender = TransitionRings(transition_graph(interactions(*histories), ITEMS), titles, BUDGETS[sources])
    for _ in range(20):
        history = random.integers(0, ITEMS, random.integers(1, 5)).tolist()
        (found,) = recommender.recommend([Query(history, ITEMS)])
        expected = expected_scores(histories, titles, history[::-1][:sources], BUDGETS[sources])
        np.testing.assert_allclose(found.scores_I, np.array(expected)[found.items_I], atol=1e-6)
        assert sorted(found.items_I.tolist()) == list(range(ITEMS))


def test_a_ring_has_the_items_that_are_no_nearer() -> None:
    graph = transition_graph(interactions([0, 1, 2, 3], [0, 2], [1, 0], [4, 4, 5]), 6)
    assert [ring.tolist() for ring in rings(graph, 0, 3)] == [[1, 2], [3], []]
    assert [ring.tolist() for ring in rings(graph, 4, 2)] == [[4, 5], []]
    assert [ring.tolist() for ring in rings(graph, 5, 2)] == [[], []]


def test_the_first_ten_items_are_seven_two_and_one_of_the_rings() -> None:
    """Item 0 is followed by 1 to 10, each of them by 11 to 20, and these by 21 to 30."""
    histories = [[0, first, first + 10, first + 20] for first in range(1, 11)]
    recommender = TransitionRings(transition_graph(interactions(*histories), 40), directions(40), BUDGETS[1])
    (found,) = recommender.recommend([Query.after([0], 10)])
    assert np.bincount((found.items_I - 1) // 10).tolist() == [7, 2, 1]
    (found,) = recommender.recommend([Query.after([0], 40)])
    assert (np.diff(found.scores_I) <= 0).all()
    assert found.scores_I[29] > 0 >= found.scores_I[30]
    assert set(found.items_I[30:].tolist()) == set(range(31, 40))


def test_an_item_that_followed_more_often_comes_first_where_titles_are_equally_similar() -> None:
    titles = of_length_one(np.ones((4, 2), np.float32))
    graph = transition_graph(interactions([0, 1], [0, 2], [0, 2]), 4)
    (found,) = TransitionRings(graph, titles, BUDGETS[1]).recommend([Query.after([0], 3)])
    assert found.items_I.tolist() == [2, 1, 3]


def test_a_history_without_a_known_item_gets_nothing_and_unknown_ones_are_skipped() -> None:
    recommender = TransitionRings(transition_graph(interactions([0, 1, 2]), 4), directions(4), BUDGETS[2])
    unknown, beyond, mixed, known = recommender.recommend(
        [Query(["New"], 3), Query([4, -1], 3), Query([0, 1, "New"], 3), Query([0, 1], 3)]
    )
    assert len(unknown) == len(beyond) == 0
    assert mixed.items_I.tolist() == known.items_I.tolist()


def test_without_any_training_sample_titles_alone_rank() -> None:
    titles = directions(5)
    (found,) = TransitionRings(transition_graph(interactions(), 5), titles, BUDGETS[1]).recommend([Query([2], 5)])
    assert found.items_I.tolist() == np.argsort(-(titles @ titles[2]), kind="stable").tolist()


def test_validation_chooses_the_number_of_sources_unless_the_name_has_it() -> None:
    options = find("tgh", Config(), "name").options
    (study,) = options.studies(Config())
    assert [trial.sources for trial in study.trials] == list(BUDGETS)
    assert options.chosen({"tgh": {"sources": 2}}).sources == 2
    stated = find("tgh-2", Config(), "name").options
    assert (stated.sources, stated.studies(Config()), stated.chosen({})) == (2, [], stated)
