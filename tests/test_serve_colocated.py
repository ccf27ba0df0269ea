"""The co-located endpoint as a user starts it, on a real Ray Serve; it follows the newest index of its workspace."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.running_endpoint import Running, ask, load, running
from support.served_items import check_answer
from support.small_endpoint import LocalEngine, grow_endpoint, write_endpoint
from support.small_workspace import ITEM_COUNT, kill_worker, wait_for, workers

from l2d_ray.config import Config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SETTINGS = {"serve.layout": "colocated", "serve.follow": True, "serve.deadline_seconds": 5}
NAME = "ServeReplica:l2d_ray:"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_endpoint(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def endpoint(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(Path(config.workspace), tmp_path_factory.mktemp("log") / "stderr", **SETTINGS) as endpoint:
        yield endpoint


def test_one_process_answers_and_its_successor_answers_those_who_wait(endpoint: Running, config: Config) -> None:
    engine = LocalEngine(config)
    assert not workers(f"{NAME}Encoder") + workers(f"{NAME}MemoryShard")

    def check_answers(histories: list[list[int]]) -> None:
        bodies = [{"history": [f"i{item}" for item in history], "k": 10} for history in histories]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda body: ask(endpoint.url, "/v1/recommend", body, 180), bodies))
        for history, (status, answer) in zip(histories, answers, strict=True):
            assert status == 200, answer
            check_answer(engine, answer, history)

    check_answers([[number, 3, 7] for number in range(20)])
    check_answers([[number, 3, 7, 9] for number in range(20)])
    assert endpoint.counts()["hits"] == 20
    gateway = workers(f"{NAME}Gateway")[-1]
    kill_worker(f"{NAME}Gateway")
    wait_for(lambda: not gateway.is_running())
    check_answers([[number, 5] for number in range(8)])


def test_a_newer_index_is_served_without_a_failed_request_and_a_roll_back_stays(
    endpoint: Running, config: Config
) -> None:
    bodies = [{"history": [f"i{item}", "i3"], "k": 10} for item in range(20)]
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
    promotion = endpoint.promote(Path(config.workspace), **{"index.snapshot": 1})
    assert promotion.returncode == 0, promotion.stderr
    assert endpoint.version() == first
    grow_endpoint(config)
    wait_for(lambda: endpoint.version() not in {first, *versions}, seconds=120)
