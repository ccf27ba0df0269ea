"""The HTTP interface over a real model and index, without Ray."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.serve.api import create_app
from l2d_ray.serve.engine import OverloadedError, Query, UnavailableError
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
LIMITS = ServeConfig(
    max_history=20,
    max_title_chars=50,
    max_filter_items=30,
    max_batch=3,
    max_k=40,
    max_body_bytes=4000,
    deadline_seconds=5,
)


@pytest.fixture(autouse=True)
def calm(engine: LocalEngine) -> None:
    engine.failure, engine.delay = None, 0.0
    engine.beams, engine.beam_failure, engine.beam_delay = None, None, 0.0


def client(engine: LocalEngine, settings: ServeConfig = LIMITS, keys: Keys = Keys("NO_SUCH_VARIABLE")) -> TestClient:  # noqa: B008
    return TestClient(create_app(engine, settings, keys), raise_server_exceptions=False)


def recommend(engine: LocalEngine, **request: Any) -> Any:
    return client(engine).post("/v1/recommend", json={"history": HISTORY, **request})


def expected(engine: LocalEngine, history: list[int | str], **settings: Any) -> list[tuple[str, float]]:
    exclude = np.array(sorted(item for item in history if isinstance(item, int)))
    defaults = {"k": 20, "aggregation": "global", "top_m": 20, "exclude": exclude}
    found = engine.answer(Query(history=history, **{**defaults, **settings}))
    pairs = zip(found.items_I.tolist(), found.scores_I.tolist(), strict=True)
    return [(f"i{item}", score) for item, score in pairs]


def pairs_of(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["item_id"], item["score"]) for item in answer["items"]]


@pytest.mark.parametrize("aggregation", ["local", "global"])
def test_the_answer_is_that_of_the_definition(engine: LocalEngine, aggregation: str) -> None:
    response = recommend(engine, aggregation=aggregation, k=7)
    assert response.status_code == 200
    answer = response.json()
    assert pairs_of(answer) == expected(engine, [3, 7, 11], aggregation=aggregation, k=7)
    assert answer["items"][0]["title"] == f"Title {answer['items'][0]['item_id'][1:]} of the year"
    assert (answer["snapshot"], answer["model"], answer["partial"]) == ("1-x", "m", False)
    assert answer["timing_ms"]["total"] >= answer["timing_ms"]["encode"] > 0


def test_filters(engine: LocalEngine) -> None:
    everything = [f"i{n}" for n in range(30)]
    seen = recommend(engine, exclude_seen=False, k=30).json()["items"]
    assert {item["item_id"] for item in seen} == set(everything)
    assert not {item["item_id"] for item in recommend(engine, k=30).json()["items"]} & set(HISTORY)
    some = recommend(engine, allow=["i1", "i2", "i3", "no such"], deny=["i2", "neither"]).json()["items"]
    assert [item["item_id"] for item in some] == ["i1"]
    assert recommend(engine, allow=[]).json()["items"] == []


def test_what_is_seen_comes_back_where_the_server_says_so(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "exclude_seen", False)
    assert set(HISTORY) <= {item["item_id"] for item in recommend(engine, k=30).json()["items"]}
    kept = recommend(engine, k=30, exclude_seen=True).json()["items"]
    assert not {item["item_id"] for item in kept} & set(HISTORY)


def test_a_title_that_the_catalogue_does_not_know_is_read(engine: LocalEngine) -> None:
    history = ["i3", {"title": "A film of tomorrow"}]
    answer = recommend(engine, history=history).json()
    assert pairs_of(answer) == expected(engine, [3, "A film of tomorrow"])
    assert pairs_of(answer) != expected(engine, [3])
    known = recommend(engine, history=[{"title": "Title 3 of the year"}], exclude_seen=False).json()
    assert pairs_of(known) == expected(engine, [3], exclude=np.array([], np.int64))


def test_unknown_items_are_refused_by_name_or_skipped(engine: LocalEngine) -> None:
    refused = recommend(engine, history=["i3", "nope", "nada"])
    assert refused.status_code == 422
    assert "body.history: unknown items: nope, nada" in refused.json()["detail"]
    skipped = recommend(engine, history=["i3", "nope"], unknown_items="skip").json()
    assert skipped["skipped"] == ["nope"]
    assert pairs_of(skipped) == expected(engine, [3])
    nothing = recommend(engine, history=["nope"], unknown_items="skip")
    assert nothing.status_code == 422
    assert "holds no item that the catalogue knows" in nothing.json()["detail"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"history": []}, "body.history"),
        ({"history": "i3"}, "body.history"),
        ({"history": [3]}, "body.history"),
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
        ({"history": HISTORY, "surprise": 1}, "body.surprise"),
        ({}, "body.history"),
    ],
)
def test_bad_requests_name_the_field(engine: LocalEngine, request_: dict[str, Any], field: str) -> None:
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
def test_hostile_bodies_are_never_a_server_error(engine: LocalEngine, body: bytes) -> None:
    response = client(engine).post("/v1/recommend", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 422)
    assert response.json()


def test_large_bodies_are_refused_before_they_are_read(engine: LocalEngine) -> None:
    large = json.dumps({"history": HISTORY, "deny": ["x" * 5000]}).encode()
    http = client(engine)
    assert http.post("/v1/recommend", content=large).status_code == 413
    chunks = (large[start : start + 500] for start in range(0, len(large), 500))
    chunked = http.post("/v1/recommend", content=chunks, headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    assert "serve.max_body_bytes" in chunked.json()["detail"]


def test_a_batch_answers_each_in_order(engine: LocalEngine) -> None:
    requests = [{"history": ["i1"], "k": 3}, {"history": HISTORY, "aggregation": "local", "k": 5}]
    responses = client(engine).post("/v1/recommend/batch", json={"requests": requests}).json()["responses"]
    assert [pairs_of(response) for response in responses] == [
        expected(engine, [1], k=3),
        expected(engine, [3, 7, 11], k=5, aggregation="local"),
    ]
    bad = client(engine).post("/v1/recommend/batch", json={"requests": [requests[0], {"history": ["nope"]}]})
    assert bad.status_code == 422
    assert bad.json()["errors"][0]["field"] == "body.requests.1.history"
    assert client(engine).post("/v1/recommend/batch", json={"requests": requests * 2}).status_code == 422


def test_keys(engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    monkeypatch.setenv(
        "SOME_KEYS", "third, fourth, voilà"
    )  # whose last byte is a space in Latin-1, as headers are read
    http = client(engine, keys=Keys("SOME_KEYS", str(file)))

    def status(key: str | None) -> int:
        headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
        return http.post("/v1/recommend", json={"history": HISTORY}, headers=headers).status_code

    assert [status(key) for key in ("first", "second", "third", "fourth", "voilà")] == [200] * 5
    assert [status(key) for key in (None, "fifth", "first ,", "firs", "七")] == [401] * 5
    file.write_text("fifth\n")
    assert (status("first"), status("fifth")) == (401, 200)
    assert [http.get(path).status_code for path in ("/v1/items", "/v1/status", "/healthz", "/")] == [401, 401, 200, 200]
    assert http.post("/v1/recommend", content=b"{").status_code == 401  # a stranger's body is not even read


@pytest.mark.parametrize(
    ("failure", "status", "detail"),
    [
        (OverloadedError("too many"), 503, "too many"),
        (UnavailableError("shards [1] are away"), 503, "shards [1] are away"),
        (ValueError("a secret of the server"), 500, "internal error"),
    ],
)
def test_failures_are_told_without_secrets(engine: LocalEngine, failure: Exception, status: int, detail: str) -> None:
    engine.failure = failure
    alone = recommend(engine)
    together = client(engine).post("/v1/recommend/batch", json={"requests": [{"history": HISTORY}]})
    for response in (alone, together):
        assert (response.status_code, response.json()["detail"]) == (status, detail)
        assert "secret" not in response.text
        assert response.headers.get("Retry-After") == ("1" if status == 503 else None)
        assert response.headers["X-Request-ID"] == response.json()["request_id"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"


def test_a_batch_that_is_refused_may_be_too_large(engine: LocalEngine) -> None:
    engine.failure = OverloadedError("come again later")
    own = {"history": HISTORY}
    for count, detail in ((1, "come again later"), (2, "come again later, or send fewer histories at once")):
        refused = client(engine).post("/v1/recommend/batch", json={"requests": [own] * count})
        assert (refused.status_code, refused.json()["detail"]) == (503, detail)


def test_the_deadline(engine: LocalEngine) -> None:
    engine.delay = 5
    http = client(engine, LIMITS.model_copy(update={"deadline_seconds": 0.05}))
    assert http.post("/v1/recommend", json={"history": HISTORY}).status_code == 504
    assert http.post("/v1/recommend/batch", json={"requests": [{"history": HISTORY}]}).status_code == 504


def test_request_ids_come_back(engine: LocalEngine) -> None:
    http = client(engine)
    assert http.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    made = http.post("/v1/recommend", json={}, headers={"X-Request-ID": "no good\tid"})
    assert made.headers["X-Request-ID"] == made.json()["request_id"] != "no good\tid"


@pytest.mark.parametrize("asked", [False, True])
def test_logs_carry_histories_only_if_asked_to(
    engine: LocalEngine, asked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    http = client(engine, LIMITS.model_copy(update={"log_histories": asked}))
    good, bad = {"history": [*HISTORY, {"title": "A film of tomorrow"}], "k": 3}, {"history": ["nope"]}
    with caplog.at_level(logging.DEBUG, "ray.serve"):
        answer = http.post("/v1/recommend", json=good).json()
        assert http.post("/v1/recommend/batch", json={"requests": [good, bad]}).status_code == 422
        assert http.post("/v1/recommend/batch", json={"requests": [good, good]}).status_code == 200
    written = [vars(record) for record in caplog.records if "tomorrow" in str(vars(record))]
    assert len(written) == 3 * asked
    for record in written:
        assert record["msg"] == "recommend"
        assert record["request"]["history"] == good["history"]
        assert record["response"]["items"] == answer["items"]


def test_titles_are_found_by_their_words(engine: LocalEngine) -> None:
    http = client(engine)
    found = http.get("/v1/items", params={"query": "YEAR títle 12"}).json()
    assert found == {"items": [{"item_id": "i12", "title": "Title 12 of the year"}], "version": "v"}
    begins = http.get("/v1/items", params={"query": "title 2", "most": 3}).json()["items"]
    assert [item["item_id"] for item in begins] == ["i2", "i20", "i21"]
    assert http.get("/v1/items", params={"query": "nothing of this kind"}).json()["items"] == []
    first = http.get("/v1/items", params={"query": " ", "most": 2}).json()["items"]
    assert [item["item_id"] for item in first] == ["i0", "i1"]
    assert len(http.get("/v1/items", params={"most": 100}).json()["items"]) == 30
    assert http.get("/v1/items", params={"query": "x" * 51}).status_code == 422


def test_the_page_and_the_documentation(engine: LocalEngine) -> None:
    http = client(engine)
    assert "<h1>l2d_ray</h1>" in http.get("/").text
    assert http.get("/static/page.js").status_code == http.get("/static/page.css").status_code == 200
    schema = http.get("/openapi.json").json()
    assert {"/v1/recommend", "/v1/recommend/batch", "/v1/items", "/v1/status", "/healthz"} == set(schema["paths"])
    for body in (RecommendRequest, RecommendResponse, BatchRequest, BatchResponse, ItemsResponse, Problem):
        for example in schema["components"]["schemas"][body.__name__]["examples"]:
            assert body.model_validate(example).model_dump(exclude_unset=True) == example
    documentation = http.get("/docs").text
    assert "https://" not in documentation
    for file in re.findall(r'"(static/[^"]+)"', documentation):
        assert http.get(file).status_code == 200
    assert documentation.count("static/") == 2


class TestBeamSearch:
    BEAMS = LIMITS.model_copy(update={"beams": 30})
    """As many as items: all are found."""

    @pytest.fixture(autouse=True)
    def offered(self, engine: LocalEngine, calm: None) -> None:
        engine.beams = self.BEAMS.beams

    def search(self, engine: LocalEngine, **request: Any) -> Any:
        return client(engine, self.BEAMS).post("/v1/beam_search", json={"history": HISTORY, **request})

    def written(self, engine: LocalEngine, history: list[int | str], exclude: list[int]) -> list[tuple[str, float]]:
        found = engine.written(Query(history, 30, "local", 20, np.array(exclude, np.int64)))
        return [(f"i{item}", score) for item, score in zip(found.items_I, found.scores_I, strict=True)]

    def test_it_is_there_only_where_it_is_offered(self, engine: LocalEngine) -> None:
        offered, refused = client(engine, self.BEAMS), client(engine)
        assert refused.post("/v1/beam_search", json={"history": HISTORY}).status_code == 404
        assert "/v1/beam_search" not in refused.get("/openapi.json").json()["paths"]
        assert "/v1/beam_search" in offered.get("/openapi.json").json()["paths"]
        assert offered.get("/v1/status").json()["beams"] == 30

    def test_the_answer_is_that_of_the_definition(self, engine: LocalEngine) -> None:
        answer = self.search(engine, k=30).json()
        assert pairs_of(answer) == self.written(engine, [3, 7, 11], exclude=[3, 7, 11])
        assert len(answer["items"]) == 27
        assert all(item["score"] < 0 for item in answer["items"])
        assert pairs_of(self.search(engine, k=5, aggregation="global", top_m=1).json()) == pairs_of(answer)[:5]
        assert (answer["snapshot"], answer["model"], answer["partial"]) == ("1-x", "m", False)
        assert answer["timing_ms"]["total"] >= answer["timing_ms"]["encode"] > 0
        few = client(engine, self.BEAMS)
        engine.beams = 4
        assert len(few.post("/v1/beam_search", json={"history": HISTORY, "k": 30}).json()["items"]) == 4

    def test_filters(self, engine: LocalEngine) -> None:
        everything = self.search(engine, exclude_seen=False, k=30).json()
        assert pairs_of(everything) == self.written(engine, [3, 7, 11], exclude=[])
        assert {item["item_id"] for item in everything["items"]} == {f"i{n}" for n in range(30)}
        some = self.search(engine, allow=["i1", "i2", "i3", "no such"], deny=["i2", "neither"]).json()["items"]
        assert [item["item_id"] for item in some] == ["i1"]
        assert self.search(engine, allow=[]).json()["items"] == []
        assert self.search(engine, deny=[f"i{n}" for n in range(30)]).json()["items"] == []

    def test_titles_and_unknown_items_are_those_of_a_recommendation(self, engine: LocalEngine) -> None:
        answer = self.search(engine, history=["i3", {"title": "A film of tomorrow"}], k=30).json()
        assert pairs_of(answer) == self.written(engine, [3, "A film of tomorrow"], exclude=[3])
        refused = self.search(engine, history=["i3", "nope"])
        assert refused.status_code == 422
        assert "body.history: unknown items: nope" in refused.json()["detail"]
        skipped = self.search(engine, history=["i3", "nope"], unknown_items="skip", k=30).json()
        assert skipped["skipped"] == ["nope"]
        assert pairs_of(skipped) == self.written(engine, [3], exclude=[3])
        assert self.search(engine, history=["i3"] * 21).status_code == 422
        assert self.search(engine, k=0).status_code == 422

    def test_failures_and_the_deadline_of_its_own(self, engine: LocalEngine) -> None:
        engine.beam_delay = 0.2
        settings = self.BEAMS.model_copy(update={"deadline_seconds": 0.1, "beam_seconds": 30})
        assert client(engine, settings).post("/v1/beam_search", json={"history": HISTORY}).status_code == 200
        engine.beam_delay = 5
        settings = self.BEAMS.model_copy(update={"beam_seconds": 0.05})
        assert client(engine, settings).post("/v1/beam_search", json={"history": HISTORY}).status_code == 504
        engine.beam_failure = OverloadedError("too many")
        overloaded = self.search(engine)
        assert (overloaded.status_code, overloaded.headers["Retry-After"]) == (503, "1")

    def test_a_key_is_needed(self, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SOME_KEYS", "first")
        http = client(engine, self.BEAMS, Keys("SOME_KEYS"))
        for key, status in (("first", 200), ("second", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert http.post("/v1/beam_search", json={"history": HISTORY}, headers=headers).status_code == status
        assert http.post("/v1/beam_search", json={"history": HISTORY}).status_code == 401


def test_other_origins_are_not_answered_unless_named(engine: LocalEngine) -> None:
    origin = {"Origin": "https://shop.example"}
    assert "access-control-allow-origin" not in client(engine).get("/healthz", headers=origin).headers
    named = client(engine, LIMITS.model_copy(update={"cors_origins": ["https://shop.example"]}))
    assert named.get("/healthz", headers=origin).headers["access-control-allow-origin"] == "https://shop.example"
