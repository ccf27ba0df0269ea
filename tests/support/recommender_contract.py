"""The contract of a recommender, as a test class that every recommender is put through."""

from collections.abc import Sequence

import numpy as np
import pytest

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.recommenders.contract import Need, Recommender
from l2d_ray.recommenders.registry import NamedRecommender
from support.small_workspace import ITEM_COUNT

MODELS = {Need.ENCODER, Need.LANGUAGE_MODEL, Need.TRAINABLE_MODEL}
"""Language models that run when a query comes."""
HISTORIES = [np.array(history, np.int32) for history in ([3], [4, 4, 4], [*range(12), 5], [3], [29, 0])]


def queries(k: int, exclude_seen: bool = True, deny: Sequence[int] = (), allow: Sequence[int] | None = None) -> list:
    allowed = None if allow is None else np.array(allow, np.int64)
    return [
        Query.after(history, k, exclude_seen, deny, allow=allowed, sample_id=sample)
        for sample, history in enumerate(HISTORIES)
    ]


def assert_alike(found: ScoredItems, expected: ScoredItems, rtol: float = 2e-3) -> None:
    assert found.items_I.tolist() == expected.items_I.tolist()
    np.testing.assert_allclose(found.scores_I, expected.scores_I, rtol=rtol)


class RecommenderContract:
    """Tests of a recommender of the items of `support.small_workspace`. A subclass gives the two fixtures."""

    @pytest.fixture
    def named(self) -> NamedRecommender:
        raise NotImplementedError

    @pytest.fixture
    def recommender(self) -> Recommender:
        raise NotImplementedError

    @pytest.mark.parametrize("k", [1, 7, ITEM_COUNT + 5])
    def test_a_list_has_at_most_k_items_sorted_and_without_repetition(self, recommender: Recommender, k: int) -> None:
        lists = recommender.recommend(queries(k))
        assert len(lists) == len(HISTORIES)
        for found in lists:
            assert 0 < len(found) <= k
            assert found.items_I.dtype == np.int64
            assert found.scores_I.shape == found.items_I.shape
            assert np.unique(found.items_I).size == len(found)
            assert ((found.items_I >= 0) & (found.items_I < ITEM_COUNT)).all()
            assert not np.isnan(found.scores_I).any()
            assert (found.scores_I[:-1] >= found.scores_I[1:]).all()

    def test_seen_items_are_excluded_only_if_the_query_says_so(self, recommender: Recommender) -> None:
        for found, history in zip(recommender.recommend(queries(ITEM_COUNT)), HISTORIES, strict=True):
            assert not np.isin(found.items_I, history).any()
        lists = recommender.recommend(queries(ITEM_COUNT, exclude_seen=False))
        assert any(np.isin(found.items_I, history).any() for found, history in zip(lists, HISTORIES, strict=True))

    def test_a_filter_changes_no_score_and_no_order(self, recommender: Recommender, named: NamedRecommender) -> None:
        whole = recommender.recommend(queries(ITEM_COUNT))
        deny = [int(found.items_I[0]) for found in whole]
        allow = sorted({int(item) for found in whole for item in found.items_I[1:4]})
        for filtered, passes in (
            (queries(ITEM_COUNT, deny=deny), ~np.isin(np.arange(ITEM_COUNT), deny)),
            (queries(ITEM_COUNT, allow=allow), np.isin(np.arange(ITEM_COUNT), allow)),
        ):
            for found, before in zip(recommender.recommend(filtered), whole, strict=True):
                assert passes[found.items_I].all()
                remaining = before.permitted(np.flatnonzero(~passes))
                if named.declaration.writes_text:  # a search that is not exhaustive may find other items instead
                    in_both = np.intersect1d(found.items_I, remaining.items_I)
                    found, remaining = found.permitted(np.empty(0), in_both), remaining.permitted(np.empty(0), in_both)
                first = slice(len(remaining))
                assert_alike(ScoredItems(found.items_I[first], found.scores_I[first]), remaining)

    def test_a_list_does_not_depend_on_the_other_queries_of_its_batch(self, recommender: Recommender) -> None:
        batch = [*queries(5), *queries(3, exclude_seen=False), *queries(4, deny=[1, 7]), *queries(6, allow=range(20))]
        for query, found in zip(batch, recommender.recommend(batch), strict=True):
            (alone,) = recommender.recommend([query])
            assert_alike(found, alone)

    def test_an_empty_batch_gives_no_lists(self, recommender: Recommender) -> None:
        assert recommender.recommend([]) == []

    def test_filters_may_name_items_that_do_not_exist(self, recommender: Recommender) -> None:
        lists = recommender.recommend(queries(5, deny=[-1, 10**6]))
        for found, expected in zip(lists, recommender.recommend(queries(5)), strict=True):
            assert_alike(found, expected)

    def test_a_history_may_hold_titles_that_the_catalogue_does_not_know(self, recommender: Recommender) -> None:
        (found,) = recommender.recommend([Query.after([3, "A title that nobody knows"], 5, sample_id=0)])
        assert 0 < len(found) <= 5
        assert 3 not in found.items_I

    def test_tokens_are_counted_if_and_only_if_a_model_runs(
        self, recommender: Recommender, named: NamedRecommender
    ) -> None:
        lists, tokens = recommender.recommend_counted(queries(5))
        assert (tokens > 0) == bool(named.needs & MODELS)
        for found, expected in zip(lists, recommender.recommend(queries(5)), strict=True):
            assert_alike(found, expected)

    def test_recommenders_that_run_together_recommend_what_each_does_alone(self, recommender: Recommender) -> None:
        outcomes = recommender.run_all([recommender, recommender], queries(5))
        for outcome in outcomes:
            assert outcome.seconds > 0
            assert outcome.tokens == recommender.recommend_counted(queries(5))[1]
            for found, expected in zip(outcome.lists, recommender.recommend(queries(5)), strict=True):
                assert_alike(found, expected)
