"""The co-located endpoint as a user starts it: on a real Ray Serve, over HTTP."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.running_endpoint import ask, running
from support.served_items import check_answer, check_items
from support.small_endpoint import LocalEngine
from support.small_workspace import kill_worker, wait_for, workers

from l2d_ray.core.query import Query

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NAME = "ServeReplica:l2d_ray:"


def test_one_process_answers_and_its_successor_answers_those_who_wait(engine: LocalEngine, tmp_path: Path) -> None:
    settings = {"serve.layout": "colocated", "serve.recommender": "transitions"}
    engine.offer("transitions")
    with running(Path(engine.config.workspace), tmp_path / "stderr", **settings) as endpoint:
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
        body = {"history": ["i1", "i3"], "k": 10, "recommender": "transitions"}
        answer = ask(endpoint.url, "/v1/recommend", body)[1]
        (expected,) = engine.others["transitions"].recommend([Query.after([1, 3], 10)])
        check_items(answer, expected)
        gateway = workers(f"{NAME}Gateway")[-1]
        kill_worker(f"{NAME}Gateway")
        wait_for(lambda: not gateway.is_running())
        check_answers([[number, 5] for number in range(8)])
