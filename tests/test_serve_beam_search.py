"""The route of constrained beam search over a real model, without Ray."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from support.served_items import pairs_of
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.core.query import Query
from l2d_ray.serve.api import create_app
from l2d_ray.serve.engine import OverloadedError
from l2d_ray.serve.security import Keys

HISTORY = ["i3", "i7", "i11"]
ITEMS = 30
SETTINGS = ServeConfig(max_history=20, max_k=40, beams=ITEMS)
"""Number of beams. There are as many items, so all of them are found."""


@pytest.fixture(autouse=True)
def offered(engine: LocalEngine) -> None:
    engine.reset()
    engine.beams = ITEMS


def client(engine: LocalEngine, settings: ServeConfig = SETTINGS, keys: str = "NO_SUCH_VARIABLE") -> TestClient:
    return TestClient(create_app(engine, settings, Keys(keys)), raise_server_exceptions=False)


def search(engine: LocalEngine, **request: Any) -> Any:
    return client(engine).post("/v1/beam_search", json={"history": HISTORY, **request})


def expected(engine: LocalEngine, history: list[int | str], exclude_seen: bool = True) -> list[tuple[str, float]]:
    return pairs_of(engine.beam_answer(Query.after(history, ITEMS, exclude_seen)))


def pairs(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["item_id"], item["score"]) for item in answer["items"]]


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_the_route_exists_only_if_beam_search_is_offered(engine: LocalEngine) -> None:
    offered, other = client(engine), client(engine, ServeConfig())
    assert other.post("/v1/beam_search", json={"history": HISTORY}).status_code == 404
    assert "/v1/beam_search" not in other.get("/openapi.json").json()["paths"]
    assert "/v1/beam_search" in offered.get("/openapi.json").json()["paths"]
    assert offered.get("/v1/status").json()["beams"] == ITEMS


def test_the_endpoint_answers_with_the_items_of_beam_search(engine: LocalEngine) -> None:
    answer = search(engine, k=ITEMS).json()
    assert pairs(answer) == expected(engine, [3, 7, 11])
    assert len(answer["items"]) == ITEMS - 3
    assert all(item["score"] < 0 for item in answer["items"])
    assert pairs(search(engine, k=5, aggregation="global", top_m=1).json()) == pairs(answer)[:5]
    assert (answer["snapshot"], answer["model"], answer["partial"]) == ("1-x", "m", False)
    assert answer["timing_ms"]["total"] >= answer["timing_ms"]["encode"] > 0
    engine.beams = 4
    assert len(search(engine, k=ITEMS).json()["items"]) == 4


def test_filters_take_items_out_of_the_answer(engine: LocalEngine) -> None:
    everything = search(engine, exclude_seen=False, k=ITEMS).json()
    assert pairs(everything) == expected(engine, [3, 7, 11], exclude_seen=False)
    assert {*ids(everything)} == {f"i{n}" for n in range(ITEMS)}
    some = search(engine, allow=["i1", "i2", "i3", "no such"], deny=["i2", "neither"])
    assert ids(some.json()) == ["i1"]
    assert ids(search(engine, allow=[]).json()) == []
    assert ids(search(engine, deny=[f"i{n}" for n in range(ITEMS)]).json()) == []


def test_titles_and_unknown_items_are_treated_as_in_a_recommendation(engine: LocalEngine) -> None:
    answer = search(engine, history=["i3", {"title": "A film of tomorrow"}], k=ITEMS).json()
    assert pairs(answer) == expected(engine, [3, "A film of tomorrow"])
    refused = search(engine, history=["i3", "nope"])
    assert refused.status_code == 422
    assert "body.history: unknown items: nope" in refused.json()["detail"]
    skipped = search(engine, history=["i3", "nope"], unknown_items="skip", k=ITEMS).json()
    assert skipped["skipped"] == ["nope"]
    assert pairs(skipped) == expected(engine, [3])
    assert search(engine, history=["i3"] * 21).status_code == 422
    assert search(engine, k=0).status_code == 422


def test_beam_search_has_a_separate_deadline(engine: LocalEngine) -> None:
    engine.beam_delay = 0.2
    settings = SETTINGS.model_copy(update={"deadline_seconds": 0.1, "beam_seconds": 30})
    assert client(engine, settings).post("/v1/beam_search", json={"history": HISTORY}).status_code == 200
    engine.beam_delay = 5
    settings = SETTINGS.model_copy(update={"beam_seconds": 0.05})
    assert client(engine, settings).post("/v1/beam_search", json={"history": HISTORY}).status_code == 504


def test_an_overloaded_beam_search_gets_503(engine: LocalEngine) -> None:
    engine.beam_failure = OverloadedError("too many")
    overloaded = search(engine)
    assert (overloaded.status_code, overloaded.headers["Retry-After"]) == (503, "1")


def test_beam_search_requires_a_key(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEYS", "first")
    http = client(engine, keys="SOME_KEYS")
    for headers, status in (
        ({"Authorization": "Bearer first"}, 200),
        ({"Authorization": "Bearer second"}, 401),
        ({}, 401),
    ):
        assert http.post("/v1/beam_search", json={"history": HISTORY}, headers=headers).status_code == status


def test_what_is_ignored_is_not_checked(engine: LocalEngine) -> None:
    ignored = {"recommender": "sasrec", "aggregation": "posterior", "top_m": 7}
    assert pairs(search(engine, k=ITEMS, **ignored).json()) == expected(engine, [3, 7, 11])
