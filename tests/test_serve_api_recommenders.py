"""The choice of a recommender over HTTP, with real ones next to L2D, without Ray."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from support.served_items import pairs_of
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.core.query import Query
from l2d_ray.serve.api import create_app
from l2d_ray.serve.engine import UnavailableError
from l2d_ray.serve.security import Keys

HISTORY = ["i3", "i7", "i11"]
NAMES = ["transitions", "most-popular"]


@pytest.fixture
def http(engine: LocalEngine) -> TestClient:
    engine.reset()
    engine.offer(*NAMES)
    return TestClient(create_app(engine, ServeConfig(), Keys("NO_SUCH_VARIABLE")), raise_server_exceptions=False)


def recommend(http: TestClient, **request: Any) -> Any:
    return http.post("/v1/recommend", json={"history": HISTORY, **request})


def pairs(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["item_id"], item["score"]) for item in answer["items"]]


def expected(engine: LocalEngine, name: str, k: int = 20, **options: Any) -> list[tuple[str, float]]:
    (found,) = engine.others[name].recommend([Query.after([3, 7, 11], k, **options)])
    return pairs_of(found)


@pytest.mark.parametrize("name", NAMES)
def test_the_named_recommender_answers(http: TestClient, engine: LocalEngine, name: str) -> None:
    answer = recommend(http, recommender=name, k=7, aggregation="local", top_m=3).json()
    assert pairs(answer) == expected(engine, name, 7)
    assert (answer["model"], answer["version"], answer["partial"]) == (f"{name}+w", "v", False)
    assert answer["timing_ms"]["encode"] == 0


def test_l2d_answers_if_no_other_one_is_named(http: TestClient, engine: LocalEngine) -> None:
    answers = [recommend(http, k=7, **named).json() for named in ({}, {"recommender": "l2d"})]
    for answer in answers:
        assert pairs(answer) == pairs_of(engine.answer(Query.after([3, 7, 11], 7, top_m=20)))
        assert answer["model"] == "m"


def test_a_name_that_is_not_served_is_refused_with_those_that_are(http: TestClient, engine: LocalEngine) -> None:
    refused = recommend(http, recommender="sasrec")
    assert refused.status_code == 422
    message = "not served; give one of l2d, transitions, most-popular (serve.recommender)"
    assert refused.json()["errors"] == [{"field": "body.recommender", "message": message}]
    for wrong in ("", 3, None):
        assert recommend(http, recommender=wrong).json()["errors"][0]["field"] == "body.recommender"
    engine.reset()
    assert recommend(http, recommender="transitions").json()["detail"].endswith("one of l2d (serve.recommender)")


def test_filters_titles_and_unknown_items_are_treated_as_by_l2d(http: TestClient, engine: LocalEngine) -> None:
    with_seen = recommend(http, recommender="transitions", exclude_seen=False, k=30).json()
    assert pairs(with_seen) == expected(engine, "transitions", 30, exclude_seen=False)
    some = recommend(http, recommender="transitions", allow=["i1", "i2", "i3", "no such"], deny=["i2"]).json()
    assert [item["item_id"] for item in some["items"]] == ["i1"]
    titled = recommend(http, recommender="transitions", history=[{"title": "A film of tomorrow"}]).json()
    assert len(titled["items"]) == 20
    refused = recommend(http, recommender="transitions", history=[*HISTORY, "nope"])
    assert "body.history: unknown items: nope" in refused.json()["detail"]
    skipped = recommend(http, recommender="transitions", history=[*HISTORY, "nope"], unknown_items="skip").json()
    assert (skipped["skipped"], pairs(skipped)) == (["nope"], expected(engine, "transitions"))


def test_the_requests_of_a_batch_name_different_recommenders(http: TestClient, engine: LocalEngine) -> None:
    requests = [{"history": HISTORY, "k": 5, "recommender": name} for name in ("l2d", *NAMES)]
    responses = http.post("/v1/recommend/batch", json={"requests": requests}).json()["responses"]
    assert [answer["model"] for answer in responses] == ["m", "transitions+w", "most-popular+w"]
    assert [pairs(answer) for answer in responses[1:]] == [expected(engine, name, 5) for name in NAMES]
    requests[1]["recommender"] = "ease"
    refused = http.post("/v1/recommend/batch", json={"requests": requests})
    assert refused.json()["errors"][0]["field"] == "body.requests.1.recommender"


def test_the_status_lists_them_with_l2d_first(http: TestClient) -> None:
    served = http.get("/v1/status").json()["recommenders"]
    assert list(served.items()) == [("l2d", "m"), ("transitions", "transitions+w"), ("most-popular", "most-popular+w")]


def test_others_answer_while_l2d_is_unavailable(http: TestClient, engine: LocalEngine) -> None:
    engine.failure = UnavailableError("the model is unavailable; try again later")
    assert recommend(http).status_code == 503
    assert recommend(http, recommender="transitions").status_code == 200
