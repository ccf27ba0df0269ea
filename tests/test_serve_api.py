"""The routes of the HTTP application over a real model and index, without Ray."""

import logging
import re
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from support.served_items import pairs_of
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.core.query import Query
from l2d_ray.index import aggregations
from l2d_ray.serve.api import create_app
from l2d_ray.serve.catalogue import _fold
from l2d_ray.serve.engine import OverloadedError, UnavailableError
from l2d_ray.serve.schemas import (
    BatchRequest,
    BatchResponse,
    ItemsResponse,
    Problem,
    RecommendRequest,
    RecommendResponse,
)
from l2d_ray.serve.security import Keys

HISTORY = ["i3", "i7", "i11"]
ALL = [f"i{n}" for n in range(30)]
LIMITS = ServeConfig(
    max_history=20,
    max_title_chars=50,
    max_filter_items=30,
    max_batch=3,
    max_k=40,
    max_body_bytes=4000,
    deadline_seconds=5,
)
NO_KEYS = Keys("NO_SUCH_VARIABLE")


@pytest.fixture(autouse=True)
def reset(engine: LocalEngine) -> None:
    engine.reset()


def client(engine: LocalEngine, settings: ServeConfig = LIMITS) -> TestClient:
    return TestClient(create_app(engine, settings, NO_KEYS), raise_server_exceptions=False)


def recommend(engine: LocalEngine, **request: Any) -> Any:
    return client(engine).post("/v1/recommend", json={"history": HISTORY, **request})


def expected(engine: LocalEngine, history: list[int | str], k: int = 20, **options: Any) -> list[tuple[str, float]]:
    return pairs_of(engine.answer(Query.after(history, k, **{"top_m": 20, **options})))


def pairs(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["item_id"], item["score"]) for item in answer["items"]]


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.parametrize("aggregation", ["local", "global", "posterior"])
def test_the_endpoint_answers_with_the_items_of_the_index(engine: LocalEngine, aggregation: str) -> None:
    response = recommend(engine, aggregation=aggregation, k=7)
    assert response.status_code == 200
    answer = response.json()
    assert pairs(answer) == expected(engine, [3, 7, 11], 7, aggregation=aggregation)
    assert answer["items"][0]["title"] == f"Title {answer['items'][0]['item_id'][1:]} of the year"
    assert (answer["snapshot"], answer["model"], answer["partial"]) == ("1-x", "m", False)
    assert answer["timing_ms"]["total"] >= answer["timing_ms"]["encode"] > 0


def test_an_aggregation_without_fitted_parameters_is_neither_offered_nor_answered(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(client(engine).get("/v1/status").json()["aggregations"]) == ["global", "local", "posterior"]
    monkeypatch.setattr(engine, "aggregations", aggregations.offered(posterior=False))
    assert list(client(engine).get("/v1/status").json()["aggregations"]) == ["global", "local"]
    response = recommend(engine, aggregation="posterior")
    assert response.status_code == 422
    assert response.json()["detail"] == "body.aggregation: not offered by this index; use global or local"
    engine.offer("most-popular")
    assert recommend(engine, aggregation="posterior", recommender="most-popular").status_code == 200


def test_filters_take_items_out_of_the_answer(engine: LocalEngine) -> None:
    assert {*ids(recommend(engine, exclude_seen=False, k=30).json())} == {*ALL}
    assert {*ids(recommend(engine, k=30).json())} == {*ALL} - {*HISTORY}
    some = recommend(engine, allow=["i1", "i2", "i3", "no such"], deny=["i2", "neither"])
    assert ids(some.json()) == ["i1"]
    assert ids(recommend(engine, allow=[]).json()) == []


def test_the_server_decides_about_seen_items_if_the_request_does_not(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "exclude_seen", False)
    assert {*HISTORY} <= {*ids(recommend(engine, k=30).json())}
    assert not {*ids(recommend(engine, k=30, exclude_seen=True).json())} & {*HISTORY}


def test_a_history_may_contain_titles_that_the_catalogue_does_not_know(engine: LocalEngine) -> None:
    answer = recommend(engine, history=["i3", {"title": "A film of tomorrow"}]).json()
    assert pairs(answer) == expected(engine, [3, "A film of tomorrow"])
    assert pairs(answer) != expected(engine, [3])
    known = recommend(engine, history=[{"title": "Title 3 of the year"}], exclude_seen=False).json()
    assert pairs(known) == expected(engine, [3], exclude_seen=False)


def test_unknown_items_are_refused_by_name_or_skipped(engine: LocalEngine) -> None:
    refused = recommend(engine, history=["i3", "nope", "nada"])
    assert refused.status_code == 422
    assert "body.history: unknown items: nope, nada; add unknown_items=skip" in refused.json()["detail"]
    skipped = recommend(engine, history=["i3", "nope"], unknown_items="skip").json()
    assert skipped["skipped"] == ["nope"]
    assert pairs(skipped) == expected(engine, [3])
    nothing = recommend(engine, history=["nope"], unknown_items="skip")
    assert nothing.status_code == 422
    assert "contains no item that the catalogue knows" in nothing.json()["detail"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"history": []}, "body.history"),
        ({"history": "i3"}, "body.history"),
        ({"history": [3]}, "body.history.0: "),
        ({"history": ["i3"] * 21}, "at most 20"),
        ({"history": [{"title": "x" * 51}]}, "body.history.0.title"),
        ({"history": [{"title": ""}]}, "body.history"),
        ({"history": HISTORY, "k": 0}, "body.k"),
        ({"history": HISTORY, "k": "5"}, "body.k"),
        ({"history": HISTORY, "k": True}, "body.k"),
        ({"history": HISTORY, "k": 10**30}, "body.k"),
        ({"history": HISTORY, "k": LIMITS.max_k + 1}, "body.k"),
        ({"history": HISTORY, "top_m": -1}, "body.top_m"),
        ({"history": HISTORY, "aggregation": "both"}, "body.aggregation"),
        ({"history": HISTORY, "deny": ["x"] * 31}, "body.deny"),
        ({"histroy": HISTORY}, "body.histroy: unknown field"),
        ({"History-2": HISTORY}, "body.History-2: unknown field"),
        ({}, "body.history"),
    ],
)
def test_an_invalid_request_is_refused_with_the_name_of_the_field(
    engine: LocalEngine, request_: dict[str, Any], field: str
) -> None:
    response = client(engine).post("/v1/recommend", json=request_)
    assert response.status_code == 422
    assert field in response.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"nul",
        b'{"history": ["i3"], "k": NaN}',
        b'{"history": ["\\ud800"]}',
        b'{"history": ["i3", "\\ud800"], "unknown_items": "skip"}',
        b'{"history": ["i3"], "deny": ["\\ud800"], "allow": ["\\ud800"]}',
        b'{"\\ud800": 1, "history": ["i3"]}',
        b"\xff\xfe",
        b"[" * 3900,
        b'{"history": ["i3"], "top_m": 1e400}',
        '{"history": [{"title": "七人の侍\\u0000 😀‮"}]}'.encode(),
    ],
)
def test_a_hostile_body_never_causes_a_server_error(engine: LocalEngine, body: bytes) -> None:
    response = client(engine).post("/v1/recommend", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 422)
    assert response.json()


def test_a_batch_is_answered_in_order(engine: LocalEngine) -> None:
    requests = [{"history": ["i1"], "k": 3}, {"history": HISTORY, "aggregation": "local", "k": 5}]
    responses = client(engine).post("/v1/recommend/batch", json={"requests": requests}).json()["responses"]
    assert [pairs(response) for response in responses] == [
        expected(engine, [1], 3),
        expected(engine, [3, 7, 11], 5, aggregation="local"),
    ]
    invalid = client(engine).post("/v1/recommend/batch", json={"requests": [requests[0], {"history": ["nope"]}]})
    assert invalid.status_code == 422
    assert invalid.json()["errors"][0]["field"] == "body.requests.1.history"
    assert client(engine).post("/v1/recommend/batch", json={"requests": requests * 2}).status_code == 422


@pytest.mark.parametrize(
    ("failure", "status", "detail"),
    [
        (OverloadedError("too many"), 503, "too many"),
        (UnavailableError("shards [1] are unavailable"), 503, "shards [1] are unavailable"),
        (ValueError("a secret of the server"), 500, "internal error"),
    ],
)
def test_a_failure_is_reported_without_secrets(
    engine: LocalEngine, failure: Exception, status: int, detail: str
) -> None:
    engine.failure = failure
    alone = recommend(engine)
    in_batch = client(engine).post("/v1/recommend/batch", json={"requests": [{"history": HISTORY}]})
    for response in (alone, in_batch):
        assert (response.status_code, response.json()["detail"]) == (status, detail)
        assert "secret" not in response.text
        assert response.headers.get("Retry-After") == ("1" if status == 503 else None)
        assert response.headers["X-Request-ID"] == response.json()["request_id"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_an_overloaded_batch_is_advised_to_be_smaller(engine: LocalEngine) -> None:
    engine.failure = OverloadedError("try again later")
    for count, detail in ((1, "try again later"), (2, "try again later, or send fewer histories at once")):
        refused = client(engine).post("/v1/recommend/batch", json={"requests": [{"history": HISTORY}] * count})
        assert (refused.status_code, refused.json()["detail"]) == (503, detail)


def test_a_request_past_its_deadline_gets_504(engine: LocalEngine) -> None:
    engine.delay = 5
    http = client(engine, LIMITS.model_copy(update={"deadline_seconds": 0.05}))
    assert http.post("/v1/recommend", json={"history": HISTORY}).status_code == 504
    assert http.post("/v1/recommend/batch", json={"requests": [{"history": HISTORY}]}).status_code == 504


@pytest.mark.parametrize("enabled", [False, True])
def test_histories_are_logged_only_if_that_is_enabled(
    engine: LocalEngine, enabled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    http = client(engine, LIMITS.model_copy(update={"log_histories": enabled}))
    valid, invalid = {"history": [*HISTORY, {"title": "A film of tomorrow"}], "k": 3}, {"history": ["nope"]}
    with caplog.at_level(logging.DEBUG, "ray.serve"):
        answer = http.post("/v1/recommend", json=valid).json()
        assert http.post("/v1/recommend/batch", json={"requests": [valid, invalid]}).status_code == 422
        assert http.post("/v1/recommend/batch", json={"requests": [valid, valid]}).status_code == 200
    records = [vars(record) for record in caplog.records if "tomorrow" in str(vars(record))]
    assert len(records) == 3 * enabled
    for record in records:
        assert record["msg"] == "recommend"
        assert record["request"]["history"] == valid["history"]
        assert record["response"]["items"] == answer["items"]


def test_items_are_found_by_words_of_their_titles(engine: LocalEngine) -> None:
    http = client(engine)
    found = http.get("/v1/items", params={"query": "YEAR títle 12"}).json()
    assert found == {"items": [{"item_id": "i12", "title": "Title 12 of the year"}], "version": "v"}
    assert ids(http.get("/v1/items", params={"query": "title 2", "most": 3}).json()) == ["i2", "i20", "i21"]
    assert ids(http.get("/v1/items", params={"query": "nothing of this kind"}).json()) == []
    assert ids(http.get("/v1/items", params={"query": " ", "most": 2}).json()) == ["i0", "i1"]
    assert len(ids(http.get("/v1/items", params={"most": 100}).json())) == 30
    assert http.get("/v1/items", params={"query": "x" * 51}).status_code == 422
    assert _fold(pa.array(["Chanel № 5", "Mamma Mia™", "TÍTLE"])).to_pylist() == ["chanel no 5", "mamma miatm", "title"]


def test_the_page_and_the_documentation_need_no_other_server(engine: LocalEngine) -> None:
    http = client(engine)
    assert "<h1>l2d_ray</h1>" in http.get("/").text
    assert http.get("/static/page.js").status_code == http.get("/static/page.css").status_code == 200
    documentation = http.get("/docs").text
    assert "https://" not in documentation
    files = re.findall(r'"(static/[^"]+)"', documentation)
    assert len(files) == documentation.count("static/") == 2
    assert [http.get(file).status_code for file in files] == [200, 200]


def test_the_description_lists_every_route_and_its_examples_are_valid(engine: LocalEngine) -> None:
    schema = client(engine).get("/openapi.json").json()
    assert {"/v1/recommend", "/v1/recommend/batch", "/v1/items", "/v1/status", "/healthz"} == set(schema["paths"])
    for body in (RecommendRequest, RecommendResponse, BatchRequest, BatchResponse, ItemsResponse, Problem):
        for example in schema["components"]["schemas"][body.__name__]["examples"]:
            assert body.model_validate(example).model_dump(exclude_unset=True) == example


def test_other_origins_are_allowed_only_if_they_are_named(engine: LocalEngine) -> None:
    origin = {"Origin": "https://shop.example"}
    assert "access-control-allow-origin" not in client(engine).get("/healthz", headers=origin).headers
    named = client(engine, LIMITS.model_copy(update={"cors_origins": ["https://shop.example"]}))
    assert named.get("/healthz", headers=origin).headers["access-control-allow-origin"] == "https://shop.example"
