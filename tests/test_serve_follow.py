"""An endpoint that follows the newest index of its workspace, on a real Ray Serve."""

from pathlib import Path

import pytest
from support.running_endpoint import ask, load, running
from support.served_items import check_answer
from support.small_endpoint import LocalEngine, grow_endpoint, write_endpoint
from support.small_workspace import ITEM_COUNT, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_newer_index_is_served_without_a_failed_request_and_a_roll_back_stays(tmp_path: Path) -> None:
    folder = tmp_path / "workspace"
    config = write_endpoint(folder)
    bodies = [{"history": [f"i{item}", "i3"], "k": 10} for item in range(20)]
    with running(folder, tmp_path / "log", **{"serve.follow": True, "serve.deadline_seconds": 5}) as endpoint:
        first = endpoint.version()
        with load(endpoint.url, bodies, rate=10) as replies:
            grow_endpoint(config)
            wait_for(lambda: any(reply.status == 200 and reply.body["version"] != first for reply in replies), 120)
        assert {reply.status for reply in replies} == {200}
        versions = [reply.body["version"] for reply in sorted(replies, key=lambda reply: reply.sent + reply.seconds)]
        assert len(set(versions)) == 2
        status, answer = ask(endpoint.url, "/v1/recommend", {"history": ["i1", f"i{ITEM_COUNT}"], "k": 10})
        assert status == 200
        check_answer(LocalEngine(config), answer, [1, ITEM_COUNT])
        promotion = endpoint.promote(folder, **{"index.snapshot": 1})
        assert promotion.returncode == 0, promotion.stderr
        assert endpoint.version() == first
        grow_endpoint(config)
        wait_for(lambda: endpoint.version() not in {first, *versions}, seconds=120)
