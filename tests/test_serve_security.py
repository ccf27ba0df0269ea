"""Bearer keys, over the real application."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.serve.api import create_app
from l2d_ray.serve.security import Keys


def test_keys_come_from_the_variable_and_the_file_which_is_read_on_every_request(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    # The last byte of "voilà" is a space in Latin-1, as which headers are decoded.
    monkeypatch.setenv("SOME_KEYS", "third, fourth, voilà")
    http = TestClient(create_app(engine, ServeConfig(), Keys("SOME_KEYS", str(file))), raise_server_exceptions=False)

    def status(key: str | None) -> int:
        headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
        return http.post("/v1/recommend", json={"history": ["i3"]}, headers=headers).status_code

    assert [status(key) for key in ("first", "second", "third", "fourth", "voilà")] == [200] * 5
    assert [status(key) for key in (None, "fifth", "first ,", "firs", "七")] == [401] * 5
    file.write_text("fifth\n")
    assert (status("first"), status("fifth")) == (401, 200)
    assert [http.get(path).status_code for path in ("/v1/items", "/v1/status", "/healthz", "/")] == [401, 401, 200, 200]
    assert http.post("/v1/recommend", content=b"{").status_code == 401  # without a key, the body is not read
    file.unlink()
    away = http.get("/v1/status", headers={"Authorization": "Bearer fifth"})
    assert (away.status_code, away.headers["Retry-After"]) == (503, "1")
