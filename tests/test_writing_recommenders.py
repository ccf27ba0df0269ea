"""Recommenders that write text, against their formulas: with known texts, or with those of a tiny model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.small_workspace import ITEM_COUNT, config_of, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.query import History, Query
from l2d_ray.recommenders.bigrec import popularity_weights
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam, TitleTrie
from l2d_ray.recommenders.contract import Need
from l2d_ray.recommenders.d3 import D3, AssistedSearch, TitlePaths
from l2d_ray.recommenders.gpt4rec import Gpt4Rec, TitleIndex, in_turns
from l2d_ray.recommenders.grounded_beam import GroundedBeam, _scaled
from l2d_ray.recommenders.registry import find
from l2d_ray.recommenders.resources import Resources
from l2d_ray.recommenders.transitions import TransitionRecommender


class KnownWriter:
    """A writer that returns the same for every query, and counts its calls."""

    def __init__(self, written: Any) -> None:
        self.written, self.calls = written, 0

    def write(self, queries: Sequence[Query]) -> tuple[list[Any], int]:
        self.calls += 1
        return [self.written] * len(queries), 7 * len(queries)


class Certain:
    """An assistant that is sure of one item."""

    def __init__(self, item: int) -> None:
        self.item = item

    def probabilities(self, history: History) -> NDArray[np.float64]:
        return np.eye(ITEM_COUNT)[self.item]


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    folder = tmp_path_factory.mktemp("workspace")
    write_dataset(folder, users=40)
    return Resources(config_of(folder), set(Need), {})


def test_distances_are_scaled_to_0_and_1() -> None:
    assert _scaled(np.array([3.0, 1.0, 2.0])).tolist() == [1, 0, 0.5]
    assert _scaled(np.array([3.0, 3.0])).tolist() == [0, 0]


def test_bigrec_divides_distances_by_powers_of_popularity() -> None:
    counts = np.array([5, 1, 3, 1])
    np.testing.assert_allclose(popularity_weights(counts, 2.0), [4, 1, 2.25, 1])
    np.testing.assert_allclose(popularity_weights(counts, 0.0), 1)
    np.testing.assert_allclose(popularity_weights(np.array([2, 2]), 9.0), 1)
    writer = KnownWriter(np.array([1.0, 0.5, 0.8, 0.0]))
    orders = {0.0: [3, 1, 2, 0], 2.0: [3, 0, 2, 1]}
    for gamma, order in orders.items():
        (found,) = GroundedBeam(writer, popularity_weights(counts, gamma)).recommend([Query([9], 4)])
        assert found.items_I.tolist() == order
    np.testing.assert_allclose(found.scores_I, [np.inf, 4, 2.25 / 0.8, 2])


def test_values_of_a_study_share_what_is_written() -> None:
    shared, other = KnownWriter(np.array([0.0, 1.0])), KnownWriter(np.array([1.0, 0.0]))
    several = [GroundedBeam(writer, np.ones(2)) for writer in (shared, other, shared)]
    outcomes = GroundedBeam.run_all(several, [Query([9], 1), Query([9], 2, exclude=np.array([0]))])
    assert [[found.items_I.tolist() for found in outcome.lists] for outcome in outcomes] == [
        [[0], [1]],
        [[1], [1]],
        [[0], [1]],
    ]
    assert [outcome.tokens for outcome in outcomes] == [14, 14, 14]
    assert (shared.calls, other.calls) == (1, 1)


def test_a_model_that_writes_nothing_recommends_nothing() -> None:
    (found,) = GroundedBeam(KnownWriter(np.empty(0)), np.ones(2)).recommend([Query([9], 4)])
    assert len(found) == 0


def test_a_guide_adds_the_probability_of_its_items_to_each_title() -> None:
    """Also to titles that are the same, and to a title with which another begins."""
    titles = [np.array(title, np.int32) for title in ([1, 2], [1, 2], [1, 3, 4], [1, 2, 9], [7])]
    probabilities = np.array([0.1, 0.2, 0.3, 0.35, 0.05])
    trie = TitleTrie.of(titles)
    guide = TitlePaths.of(trie, titles).guide(probabilities)
    for item, title in enumerate(titles):
        path = trie.grow(title.tolist())
        added = guide.steps_N[path].sum() + guide.ends_N[path[-1]]
        assert added == pytest.approx(np.log(probabilities[trie.items[path[-1]]].sum()))
        assert probabilities[item] > 0
    assert guide.steps_N[0] == 0


def test_d3_scores_by_the_probability_of_the_title_and_by_that_of_the_item(resources: Resources) -> None:
    """With as many beams as titles, it is what the paper's search finds at every alpha."""
    beam = ConstrainedBeam.over(resources.language_model, resources.encoder, ITEM_COUNT, ITEM_COUNT, batch_size=2)
    assistant = TransitionRecommender.fit(resources.training_interactions, ITEM_COUNT)
    search, queries = AssistedSearch.over(beam, assistant), [Query([3], ITEM_COUNT), Query([4, 9], 7, np.array([5, 8]))]
    titles = beam.recommend([Query(query.history, ITEM_COUNT) for query in queries])
    for alpha in (0.0, 0.25, 1.0):
        for query, title, found in zip(queries, titles, D3(search, alpha).recommend(queries), strict=True):
            expected = np.empty(ITEM_COUNT)
            expected[title.items_I] = alpha * title.scores_I
            expected += (1 - alpha) * np.log(assistant.probabilities(query.history))
            np.testing.assert_allclose(found.scores_I, expected[found.items_I], rtol=1e-4)
            expected[query.exclude] = -np.inf
            assert found.items_I.tolist() == np.argsort(-expected, kind="stable")[: query.k].tolist()


def test_the_assistant_of_d3_leads_the_beams(resources: Resources) -> None:
    """Two beams find the title that the assistant deems certain, whatever the language model says."""
    beam = ConstrainedBeam.over(resources.language_model, resources.encoder, ITEM_COUNT, 2, batch_size=2)
    for item in range(ITEM_COUNT):
        (found,) = D3(AssistedSearch.over(beam, Certain(item)), 1.0).recommend([Query([3], 2)])
        assert item in found.items_I


def test_rankings_take_turns_and_give_no_item_twice() -> None:
    rankings = [np.array(ranking) for ranking in ([1, 2, 3, 4], [2, 1, 7], [], [2, 3, 8])]
    assert list(in_turns(rankings)) == [1, 2, 3, 4, 7, 8]
    assert list(in_turns([])) == []


def test_bm25_finds_titles_by_rare_words_and_short_ones() -> None:
    index = TitleIndex.of(["Toy Story", "Toy Story 3", "The Story of Us", "...", "Rocky V"])
    assert index.ranking("toy STORY 3 nobody").tolist() == [1, 0, 2]
    assert index.ranking("story").tolist() == [0, 1, 2]  # shorter titles first
    assert index.ranking("v.").tolist() == [4]
    assert index.ranking("nobody").tolist() == index.ranking("?").tolist() == index.ranking("").tolist() == []
    assert TitleIndex.of(["...", ""]).ranking("toy").tolist() == []


def test_gpt4rec_gives_every_query_its_share_of_each_list() -> None:
    index = TitleIndex.of(["a one", "a two two", "a three three three", "b one", "b two two", "c"])
    recommender = Gpt4Rec(KnownWriter(["a", "b", "x"]), index)
    for k, items in ((2, [0, 3]), (4, [0, 3, 1, 4]), (6, [0, 3, 1, 4, 2])):
        (found,) = recommender.recommend([Query([9], k)])
        assert found.items_I.tolist() == items
        np.testing.assert_allclose(found.scores_I, 1 / np.arange(1, len(items) + 1))
    (found,) = recommender.recommend([Query([9], 2, np.array([3]), allow=np.array([1, 3, 4, 5]))])
    assert (found.items_I.tolist(), found.scores_I.tolist()) == ([1, 4], [1 / 3, 1 / 4])


def test_gpt4rec_searches_for_what_the_model_writes(resources: Resources) -> None:
    texts, tokens = find("gpt4rec-5", Config(), "name").make(resources).writer.write([Query([3]), Query([4, 9])])
    assert [len(of_query) for of_query in texts] == [5, 5]
    assert not any("\n" in text or "<s>" in text for of_query in texts for text in of_query)
    assert tokens > 0


@pytest.mark.parametrize(("name", "tuned", "stated"), [("bigrec", "gamma", 0.5), ("d3", "alpha", 0.0)])
def test_a_name_without_a_number_leaves_it_to_validation(name: str, tuned: str, stated: float) -> None:
    options = find(name, Config(), "name").options
    (study,) = options.studies(Config())
    assert study.default in [getattr(trial, tuned) for trial in study.trials]
    assert getattr(options.chosen({name: {tuned: 0.25}}), tuned) == 0.25
    fixed = find(f"{name}-{stated}", Config(), "name").options
    assert (getattr(fixed, tuned), fixed.studies(Config()), fixed.chosen({})) == (stated, [], fixed)


def test_a_title_whose_state_is_not_finite_leaves_the_others() -> None:
    assert _scaled(np.array([3.0, np.nan, 1.0, 2.0]))[[0, 2, 3]].tolist() == [1, 0, 0.5]
