"""Explanations of the scores of L2D: their terms, the sequences they name, and their way through HTTP and Python."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from support.fake_handles import FakeHandle
from support.l2d_definitions import prior
from support.small_endpoint import LocalEngine
from support.small_workspace import ITEM_COUNT, write_dataset

import l2d_ray
from l2d_ray.config import ServeConfig
from l2d_ray.core.explanation import ItemExplanation
from l2d_ray.core.query import Query
from l2d_ray.core.samples import sample_ids
from l2d_ray.data.dataset import Dataset
from l2d_ray.data.samples import training_interactions
from l2d_ray.data.sequences import LAST_ITEMS, TrainingSequences
from l2d_ray.distributed.serving.metrics import GatewayMetrics
from l2d_ray.distributed.serving.search import ShardGroups
from l2d_ray.errors import InputError
from l2d_ray.index.exchange import Request
from l2d_ray.index.explanation import explain_items
from l2d_ray.schema import Split
from l2d_ray.serve.api import create_app
from l2d_ray.serve.explanations import Explainer
from l2d_ray.serve.security import Keys
from l2d_ray.workspace import Workspace

HISTORY = [3, 7, "A title that nobody knows", 7, 11]
TERMS = {"state", "transitions", "popularity", "repetition", "normalisation"}


@pytest.fixture(autouse=True)
def reset(engine: LocalEngine) -> None:
    engine.reset()


def explained(engine: LocalEngine, **options: Any) -> tuple[Query, Any, dict[int, ItemExplanation]]:
    """Return a query, the items that it finds, and their explanations."""
    query = Query.after(HISTORY, ITEM_COUNT, exclude_seen=False, aggregation="posterior", **options)
    (state_D,), found = engine.encoder.encode([HISTORY]).states_UD, engine.answer(query)
    return query, found, engine.index.explain(state_D, HISTORY, found)


def test_the_terms_add_up_to_the_score_of_each_item(engine: LocalEngine) -> None:
    _, found, explanations = explained(engine)
    assert {*explanations} == {*range(ITEM_COUNT)}
    for item, score in zip(found.items_I.tolist(), found.scores_I.tolist(), strict=True):
        assert explanations[item].terms.keys() == TERMS
        assert sum(explanations[item].terms.values()) == pytest.approx(score)
    assert len({round(one.terms["normalisation"], 9) for one in explanations.values()}) == 1


def test_the_terms_of_the_prior_are_those_of_the_formula(engine: LocalEngine) -> None:
    _, _, explanations = explained(engine)
    training = training_interactions(Dataset.open(Workspace.open(engine.config.workspace)))
    histories = [part.tolist() for part in np.split(training.items, training.offsets[1:-1])]
    parameters = engine.index.shards[0].scorer.parameters
    prior_I = prior(histories, ITEM_COUNT, HISTORY, parameters)
    popularity_I = prior(histories, ITEM_COUNT, ["A title that nobody knows"], parameters)
    for item, explanation in explanations.items():
        terms = explanation.terms
        assert terms["popularity"] == pytest.approx(parameters.prior_weight * np.log(popularity_I[item]))
        lift = parameters.prior_weight * np.log(prior_I[item] / popularity_I[item])
        assert terms["transitions"] == pytest.approx(lift)
        assert terms["repetition"] == pytest.approx(np.log(parameters.repeat) if item in HISTORY else 0)


def test_the_last_items_share_what_popularity_leaves(engine: LocalEngine) -> None:
    _, _, explanations = explained(engine)
    (after, *_) = (one.after for one in explanations.values() if len(one.after) == 3)
    assert {*after} == {3, 7, 11}  # 7 once, although it is there twice
    assert [*after.values()] == sorted(after.values(), reverse=True)
    assert 0 < sum(after.values()) < 1


def test_an_item_without_memory_rows_is_explained_by_its_title(engine: LocalEngine) -> None:
    _, found, _ = explained(engine)
    (mapped_D,) = engine.index.space(engine.encoder.encode([HISTORY]).states_UD)
    shard = engine.index.shards[0]
    first, second = shard.items_I[:2].tolist()
    explanations = explain_items(replace(shard, items_I=shard.items_I[1:]), mapped_D, HISTORY, found)
    assert explanations[first].terms.keys() == TERMS - {"state"} | {"title"}
    assert explanations[second].terms.keys() == TERMS


def test_the_named_samples_are_the_nearest_rows_of_the_item(engine: LocalEngine) -> None:
    _, _, explanations = explained(engine)
    (mapped_D,) = engine.index.space(engine.encoder.encode([HISTORY]).states_UD)
    for shard in engine.index.shards:
        (segment,) = shard.segments
        for item in shard.items_I.tolist():
            rows = np.flatnonzero(segment.row_items_M == item)
            distances = np.square(segment.rows.vectors_ND[rows].astype(np.float64) - mapped_D).sum(axis=1)
            nearest = segment.sample_ids_M[rows[np.argsort(distances)[:2]]]
            assert explanations[item].sample_ids == nearest.tolist()


def test_a_sequence_has_the_last_items_before_the_target_of_its_sample(engine: LocalEngine) -> None:
    dataset = Dataset.open(Workspace.open(engine.config.workspace))
    sequences = TrainingSequences.read(dataset)
    for user in next(dataset.iter_users()).to_pylist()[:5]:
        for position in np.flatnonzero(np.array(user["splits"]) == Split.TRAIN).tolist():
            (sample,) = sample_ids(np.array([user["user_hash"]]), np.array([position])).tolist()
            assert sequences.of(sample) == user["item_indices"][max(position - LAST_ITEMS, 0) : position]
    assert sequences.of(12345) == []
    assert sequences.of(2**63 - 1) == []


def http(engine: LocalEngine, **request: Any) -> Any:
    client = TestClient(create_app(engine, ServeConfig(), Keys("NO_SUCH_VARIABLE")), raise_server_exceptions=False)
    history = [{"title": item} if isinstance(item, str) else f"i{item}" for item in HISTORY]
    return client.post("/v1/recommend", json={"history": history, **request})


def test_the_endpoint_explains_in_titles_and_never_in_users(engine: LocalEngine) -> None:
    response = http(engine, aggregation="posterior", explain=True, k=5)
    for item in response.json()["items"]:
        explanation = item["explanation"]
        assert sum(explanation["terms"].values()) == pytest.approx(item["score"], abs=1e-3)
        assert item["probability"] == pytest.approx(np.exp(item["score"]))
        assert {one["title"] for one in explanation["after"]} <= {f"Title {n} of the year" for n in (3, 7, 11)}
        assert len(explanation["sequences"]) == 2
        assert all(title.startswith("Title ") for sequence in explanation["sequences"] for title in sequence)
    users = next(Dataset.open(Workspace.open(engine.config.workspace)).iter_users()).to_pylist()
    private = [text for user in users[1:] for text in (json.dumps(user["user_id"]), str(user["user_hash"]))]
    assert [text for text in private if text in response.text] == []


def test_nothing_is_explained_unless_it_is_asked_for(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LocalEngine, "explain")
    for aggregation, more in (("global", set()), ("posterior", {"probability"})):
        (item, *_) = http(engine, aggregation=aggregation).json()["items"]
        assert item.keys() == {"item_id", "title", "score"} | more


@pytest.mark.parametrize("request_", [{}, {"aggregation": "global"}, {"recommender": "transitions"}])
def test_other_scores_are_not_explained(engine: LocalEngine, request_: dict[str, str]) -> None:
    engine.offer("transitions")
    refused = http(engine, explain=True, **request_)
    message = "explains only the scores of l2d with aggregation=posterior; give these, or leave it out"
    assert refused.json()["errors"] == [{"field": "body.explain", "message": message}]


def test_an_explanation_is_one_more_round_and_otherwise_there_is_none(engine: LocalEngine) -> None:
    query, found, expected = explained(engine)
    query_UD, rounds = engine.index.space(engine.encoder.encode([HISTORY]).states_UD), list[str]()

    away: list[int] = []

    def handle(number: int) -> FakeHandle:
        async def answer(version: str, request: Request) -> list[Any]:
            if number in away:
                raise TimeoutError
            rounds.append(request.function.__name__)
            return request.answer([engine.index.shards[number]])

        return FakeHandle(answer=answer)

    shards = len(engine.index.shards)
    settings = ServeConfig(partial=True)
    groups = ShardGroups([handle(number) for number in range(shards)], settings, GatewayMetrics())

    async def scenario() -> tuple[dict[int, ItemExplanation], list[int]]:
        await groups.search("v", shards, query, query_UD)
        assert rounds == ["score_items"] * shards
        return await groups.explain("v", shards, query, query_UD, found)

    assert asyncio.run(scenario()) == (expected, [])
    assert rounds == ["score_items"] * shards + ["explain_items"] * shards
    away.append(1)  # between search and explanation
    some, missing = asyncio.run(groups.explain("v", shards, query, query_UD, found))
    assert missing == [1]
    assert some == {item: one for item, one in expected.items() if item in some}
    assert 0 < len(some) < len(expected)


def test_a_recommendation_in_python_is_explained_alike(engine: LocalEngine) -> None:
    recommender = l2d_ray.load(engine.config.workspace)
    history = [{"title": item} if isinstance(item, str) else f"i{item}" for item in HISTORY]
    found = recommender.recommend(history, k=5, aggregation="posterior", explain=True)
    expected = [
        item["explanation"] for item in http(engine, aggregation="posterior", explain=True, k=5).json()["items"]
    ]
    assert [one.explanation.sequences for one in found] == [one["sequences"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.explanation.terms == pytest.approx(other["terms"], abs=1e-3)
    assert recommender.recommend(history, k=1)[0].explanation is None
    with pytest.raises(InputError, match="explain=True: explains only L2D with aggregation='posterior'; give that"):
        recommender.recommend(history, explain=True)


def test_without_its_dataset_a_memory_names_no_sequences(
    engine: LocalEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(Path(engine.config.workspace) / "dataset", tmp_path / "dataset")
    write_dataset(tmp_path, users=3, seed=9)
    _, found, explanations = explained(engine)
    explainer = Explainer(Workspace.open(str(tmp_path)), engine.dataset, engine.catalogue.ids, engine.catalogue.titles)
    for one in explainer.explain(found.items_I.tolist(), explanations):
        assert one is not None
        assert one.sequences == []
    assert len(caplog.messages) == 1
    assert explainer.explain([0], {}) == [None]
