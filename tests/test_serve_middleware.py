"""Request ids and the limits on bodies, over the real application."""

import json

from fastapi.testclient import TestClient
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.serve.api import create_app
from l2d_ray.serve.security import Keys


def client(engine: LocalEngine) -> TestClient:
    settings = ServeConfig(max_body_bytes=4000)
    return TestClient(create_app(engine, settings, Keys("NO_SUCH_VARIABLE")), raise_server_exceptions=False)


def test_a_large_body_is_refused_before_it_is_read(engine: LocalEngine) -> None:
    large = json.dumps({"history": ["i3"], "deny": ["x" * 5000]}).encode()
    http = client(engine)
    assert http.post("/v1/recommend", content=large).status_code == 413
    chunks = (large[start : start + 500] for start in range(0, len(large), 500))
    chunked = http.post("/v1/recommend", content=chunks, headers={"Content-Type": "application/json"})
    assert chunked.status_code == 413
    assert "serve.max_body_bytes" in chunked.json()["detail"]


def test_a_well_formed_request_id_comes_back_and_others_are_replaced(engine: LocalEngine) -> None:
    http = client(engine)
    assert http.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["X-Request-ID"] == "abc-1"
    replaced = http.post("/v1/recommend", json={}, headers={"X-Request-ID": "no good\tid"})
    assert replaced.headers["X-Request-ID"] == replaced.json()["request_id"] != "no good\tid"
