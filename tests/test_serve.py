"""The endpoint as a user starts it, with one gateway and one encoder: on a real Ray Serve, over HTTP.

The first tests ask; then come hostile requests, overload and deaths of processes.
"""

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from support.hostile_inputs import CONTROL_HEADERS
from support.hostile_requests import EXAMPLES, Hostile, attack, good, post, send
from support.running_endpoint import Reply, Running, ask, request, running
from support.served_items import (
    BEAMS,
    SINGLE,
    check_answer,
    check_beam_answer,
    check_items,
    check_partial,
    check_prompt_answer,
)
from support.small_endpoint import LocalEngine, train_recommender, write_endpoint
from support.small_workspace import command, kill_worker, wait_for, workers

from l2d_ray.core.query import Query
from l2d_ray.serve.middleware import REQUEST_ID

pytestmark = [pytest.mark.ray, pytest.mark.slow]
HOSTILE_REQUESTS = 3 * EXAMPLES
BODY = {"history": ["i1", "i2", "i3"], "k": 10}


@pytest.fixture(scope="module")
def endpoint(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    train_recommender(engine.config)
    settings, log = SINGLE | {"serve.recommender": "sasrec,transitions"}, tmp_path_factory.mktemp("log") / "stderr"
    with running(Path(engine.config.workspace), log, **settings) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def url(endpoint: Running) -> str:
    return endpoint.url


@pytest.mark.parametrize("aggregation", ["local", "global", "posterior"])
def test_parallel_requests_each_get_the_right_answer(url: str, engine: LocalEngine, aggregation: str) -> None:
    random = np.random.default_rng(1)
    histories = [random.integers(0, 30, random.integers(1, 15)).tolist() for _ in range(40)]
    bodies = [{"history": [f"i{n}" for n in items], "aggregation": aggregation, "k": 10} for items in histories]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: ask(url, "/v1/recommend", body), bodies))
    for history, (status, answer) in zip(histories, answers, strict=True):
        assert status == 200, answer
        check_answer(engine, answer, history, aggregation)
    _, status = ask(url, "/v1/status")
    assert {answer["snapshot"] for _, answer in answers} == {status["snapshot"]}
    assert {answer["model"] for _, answer in answers} == {status["model"]}
    assert (status["items"], status["rows"], status["shards"]) == (30, 360, 2)


def test_titles_batches_and_refusals_reach_the_client(url: str, engine: LocalEngine) -> None:
    body = {"history": ["i3", {"title": "A film of tomorrow"}], "k": 5}
    status, answer = ask(url, "/v1/recommend/batch", {"requests": [body, body]})
    assert status == 200
    for response in answer["responses"]:
        check_answer(engine, response, [3, "A film of tomorrow"], k=5)
    status, answer = ask(url, "/v1/recommend", {"history": ["nope"]})
    assert (status, answer["errors"][0]["field"]) == (422, "body.history")


def test_recommenders_next_to_l2d_answer_in_parallel(url: str, engine: LocalEngine) -> None:
    engine.offer("sasrec", "transitions")
    asked = [(number, name) for number in range(10) for name in engine.others]
    bodies = [{"history": [f"i{number}", "i3"], "k": 10, "recommender": name} for number, name in asked]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: ask(url, "/v1/recommend", body), bodies))
    served = ask(url, "/v1/status")[1]["recommenders"]
    assert list(served) == ["l2d", "sasrec", "transitions"]
    for (number, name), (status, answer) in zip(asked, answers, strict=True):
        assert (status, answer["model"]) == (200, served[name]), answer
        (expected,) = engine.others[name].recommend([Query.after([number, 3], 10)])
        check_items(answer, expected)


def test_the_shards_explain_the_probabilities(url: str, engine: LocalEngine) -> None:
    body = {"history": ["i3", "i7"], "k": 5, "aggregation": "posterior", "explain": True}
    status, answer = ask(url, "/v1/recommend", body)
    assert status == 200, answer
    query = Query.after([3, 7], 5, aggregation="posterior")
    for item, expected in zip(answer["items"], engine.explain(query, engine.answer(query)), strict=True):
        assert expected is not None
        assert item["explanation"]["sequences"] == expected.sequences
        assert item["explanation"]["terms"] == pytest.approx(expected.terms, abs=2e-3)
        assert sum(item["explanation"]["terms"].values()) == pytest.approx(item["score"], abs=1e-3)


def test_beam_search_is_answered_in_parallel(url: str, engine: LocalEngine) -> None:
    bodies = [{"history": [f"i{n}", {"title": "A film of tomorrow"}, "i3"], "k": 10} for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: ask(url, "/v1/beam_search", body), bodies))
    for number, (status, answer) in enumerate(answers):
        assert status == 200, answer
        check_beam_answer(engine, answer, [number, "A film of tomorrow", 3])
    assert ask(url, "/v1/status")[1]["beams"] == BEAMS


@pytest.mark.parametrize("header", CONTROL_HEADERS)
def test_no_header_controls_ray(url: str, header: bytes) -> None:
    valid, invalid = (
        send(url, Hostile("headers", post(body, header))) for body in (b'{"history": ["i3"]}', b'{"history": []}')
    )
    assert (valid.status, invalid.status) == (200, 422)
    for reply in (valid, invalid):
        assert REQUEST_ID.fullmatch(reply.headers["x-request-id"])
    assert invalid.headers["x-request-id"] == json.loads(invalid.body)["request_id"]


def test_the_request_id_of_a_client_comes_back_once(url: str) -> None:
    for path in (b"/v1/recommend", b"/none"):
        reply = send(url, Hostile("headers", post(b"{}", b"X-Request-ID: mine-1", path=path)))
        assert reply.headers["x-request-id"] == "mine-1", path


def test_prometheus_finds_the_metrics_at_the_printed_url(endpoint: Running) -> None:
    assert ask(endpoint.url, "/v1/recommend", {"history": ["i1"]})[0] == 200
    (address,) = re.findall(r"http://\S+/metrics", endpoint.log.read_text())

    def exported() -> set[str]:
        text = str(request(address, "").body, "utf-8")
        return set(re.findall(r"^ray_l2d_ray_\w+?(?=_bucket|\{)", text, re.MULTILINE))

    of_requests = {"ray_l2d_ray_requests_total", "ray_l2d_ray_phase_ms", "ray_l2d_ray_shard_ms"}
    of_batches = {"ray_l2d_ray_batch_requests", "ray_l2d_ray_batch_tokens", "ray_l2d_ray_waiting"}
    wait_for(lambda: exported() >= of_requests | of_batches, seconds=60)


def test_haproxy_listens_on_this_machine_only(url: str) -> None:
    haproxy = workers("bin/haproxy")[-1]  # older ones are stopping
    listening = [one.laddr for one in haproxy.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert urlsplit(url).port in [port for _, port in listening]
    assert {ip for ip, _ in listening} == {"127.0.0.1"}


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_served(
    endpoint: Running, engine: LocalEngine, tmp_path: Path
) -> None:
    before = endpoint.version()
    newer = write_endpoint(tmp_path, seed=2)
    untrained = endpoint.promote(tmp_path)
    assert untrained.returncode == 2
    assert untrained.stderr.endswith("sasrec/training.json: not found; run jobs/train.py recommender=sasrec first\n")
    train_recommender(newer)
    for folder in (tmp_path, Path(engine.config.workspace)):
        of_another_model = endpoint.promote(folder, **{"prompt.suffix": "Then:"})
        assert of_another_model.returncode == 2
        assert of_another_model.stderr.startswith("error: prompt.suffix='Then:': ")
        assert of_another_model.stderr.count("\n") == 1
    (file, *_) = tmp_path.glob("index/**/rows.faiss")
    file.write_bytes(file.read_bytes()[:-1])
    refused = endpoint.promote(tmp_path)
    assert refused.returncode == 2
    assert file.name in refused.stderr
    status, answer = ask(endpoint.url, "/v1/recommend", {"history": ["i1", "i2", "i3"], "k": 10})
    assert (status, answer["version"]) == (200, before)
    check_answer(engine, answer, [1, 2, 3])


def test_hostile_requests_are_answered_and_do_not_leak_memory(url: str, engine: LocalEngine) -> None:
    processes = [*workers("bin/haproxy"), *workers("ProxyActor"), *workers("ServeReplica:l2d_ray")]
    assert len(processes) > 5

    def valid_ids(url: str) -> list[str]:
        """Return the ids alone: the last digits of the scores depend on what the encoder has cached."""
        return [item["item_id"] for item in good(url)]

    attack(url, 0, HOSTILE_REQUESTS // 2, valid_ids)  # warm-up: caches fill once
    before = [process.memory_info().rss for process in processes]
    attack(url, 1, HOSTILE_REQUESTS // 2, valid_ids)
    grown = [process.memory_info().rss - rss for process, rss in zip(processes, before, strict=True)]
    print(f"{HOSTILE_REQUESTS} hostile requests; growth of the processes in MB: {[size >> 20 for size in grown]}")
    assert max(grown) < 32 << 20
    check_answer(engine, ask(url, "/v1/recommend", {"history": ["i3"], "k": 5})[1], [3], k=5)


def test_headers_and_bodies_that_do_not_arrive_get_408(url: str) -> None:
    parts = [b"POST /v1/recommend HTTP/1.1\r\nHost: a\r\n", post(b'{"history": ', length=b"100")]
    clients = [socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60) for _ in parts]
    for client, part in zip(clients, parts, strict=True):
        client.sendall(part)
    for client in clients:
        with client:
            assert client.recv(12) == b"HTTP/1.1 408"


def test_the_remaining_shards_give_a_partial_answer(url: str, engine: LocalEngine) -> None:
    def outcome() -> str:
        status, answer = ask(url, "/v1/recommend", {**BODY, "aggregation": "local"})
        assert status == 200, answer
        if answer["partial"]:
            assert answer["missing_shards"] == [1]
            check_partial(engine, answer)
            return "partial"
        check_answer(engine, answer, [1, 2, 3], "local")
        return "whole"

    replicas = workers("ServeReplica:l2d_ray:MemoryShard-1")
    for replica in replicas:
        replica.suspend()  # dead ones could be replaced before the request
    outcomes, deadline = [outcome()], time.monotonic() + 300
    for replica in replicas:
        replica.kill()
    while outcomes[-5:] != ["whole"] * 5:
        assert time.monotonic() < deadline, outcomes
        outcomes.append(outcome())
    assert outcomes[0] == "partial"


def test_requests_wait_for_the_only_gateway_up_to_a_limit(url: str) -> None:
    limit, deadline = SINGLE["serve.max_waiting"], time.monotonic() + 300
    assert isinstance(limit, int)
    refused: list[Reply] = []
    while len(refused) < limit / 2:  # requests that come before the death is noticed wait with the dead gateway
        assert time.monotonic() < deadline
        kill_worker("ServeReplica:l2d_ray:Gateway")
        with ThreadPoolExecutor(2 * limit) as pool:
            replies = list(pool.map(lambda _: request(url, "/v1/status", timeout=180), range(2 * limit)))
        refused = [reply for reply in replies if reply.status != 200]
    for reply in refused:
        assert (reply.status, reply.headers["retry-after"], reply.body["errors"]) == (503, "1", [])
        assert "too many requests are waiting for it" in reply.body["detail"]


@pytest.mark.parametrize("component", ["Encoder", "Gateway"])
def test_the_only_replica_is_replaced(url: str, engine: LocalEngine, component: str) -> None:
    """Also without the dataset, which may be replaced by a newer one at that moment."""
    dataset = Path(engine.config.workspace) / "dataset"
    dataset.rename(dataset.with_name("away"))
    try:
        with ThreadPoolExecutor(12) as pool:  # many connections at once, which the death of the gateway breaks
            assert {reply.status for reply in pool.map(lambda _: request(url, "/v1/status"), range(24))} == {200}
        kill_worker(f"ServeReplica:l2d_ray:{component}")
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda _: request(url, "/v1/recommend", BODY), range(4)))
        deadline = time.monotonic() + 300
        while [reply.status for reply in replies[-5:]] != [200] * 5:
            assert time.monotonic() < deadline, replies
            replies.append(request(url, "/v1/recommend", BODY))
    finally:
        dataset.with_name("away").rename(dataset)
    for reply in replies:
        if reply.status == 200:
            check_answer(engine, reply.body, [1, 2, 3])
        else:
            assert (reply.status, reply.headers.get("retry-after")) in ((503, "1"), (504, None)), reply


def test_l2d_answers_while_the_recommenders_next_to_it_are_replaced(url: str, engine: LocalEngine) -> None:
    body, deadline = BODY | {"recommender": "transitions"}, time.monotonic() + 300
    before = ask(url, "/v1/recommend", body)[1]["items"]
    kill_worker("ServeReplica:l2d_ray:Recommenders")
    check_answer(engine, ask(url, "/v1/recommend", BODY)[1], [1, 2, 3])
    while (reply := request(url, "/v1/recommend", body)).status != 200:
        assert reply.status in (503, 504), reply
        assert time.monotonic() < deadline
    assert reply.body["items"] == before


def test_a_dead_haproxy_is_started_again(url: str, engine: LocalEngine) -> None:
    kill_worker("bin/haproxy")
    assert request(url, "/v1/recommend", BODY).status == 0
    wait_for(lambda: request(url, "/v1/recommend", BODY).status == 200, seconds=60)
    check_answer(engine, ask(url, "/v1/recommend", {"history": ["i3"], "k": 5})[1], [3], k=5)


def test_overload_is_refused_with_retry_after(url: str, engine: LocalEngine) -> None:
    batch = {"requests": [BODY] * 64}
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: request(url, "/v1/recommend/batch", batch), range(24)))
    assert 503 in {reply.status for reply in replies} <= {200, 503, 504}  # 504 on a slow machine
    for reply in replies:
        if reply.status == 200:
            for answer in reply.body["responses"]:
                if answer["partial"]:  # a shard that came too late
                    check_partial(engine, answer)
                else:
                    check_answer(engine, answer, [1, 2, 3])
        elif reply.status == 503:
            assert reply.headers["retry-after"] == "1"
            detail = reply.body["detail"].removesuffix(", or send fewer histories at once")
            assert detail.endswith("; try again later")
    check_prompt_answer(url, engine)


def test_histories_of_a_client_that_left_are_not_run(endpoint: Running, engine: LocalEngine) -> None:
    """The client leaves at once. Its long histories run one by one, so that not all have run by then."""
    titles = [{"title": f"{number} " * 120} for number in range(64)]
    batch = {"requests": [{"history": [title, *titles[:9]]} for title in titles]}
    before = endpoint.counts()
    assert request(endpoint.url, "/v1/recommend/batch", batch, timeout=0.2).status == 0
    check_prompt_answer(endpoint.url, engine)
    assert endpoint.counts()["requests"] - before["requests"] < 64


def test_a_promotion_names_a_component_without_replicas_and_goes_back(
    endpoint: Running, engine: LocalEngine, tmp_path: Path
) -> None:
    """The encoder has died, and its successor cannot start without the folder of the model."""
    train_recommender(write_endpoint(tmp_path, seed=2))
    before, model = endpoint.version(), Path(engine.config.model.name)
    model.rename(model.with_name("away"))
    try:
        kill_worker("ServeReplica:l2d_ray:Encoder")
        promotion = "l2d_ray.distributed.serving.promotion"
        program = (
            f"import {promotion} as promotion; promotion.REPLACED_SECONDS = 20;"
            f" from l2d_ray.distributed.job import run; run('{promotion}:promote')"
        )
        job = endpoint.promotion(tmp_path)
        job[1:2] = ["-c", program]
        failed = subprocess.run(job, env=endpoint.environment(), capture_output=True, text=True, check=False)
    finally:
        model.with_name("away").rename(model)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: Encoder: no replica has answered for 20 s (")
    assert "Traceback" not in failed.stderr
    wait_for(lambda: request(endpoint.url, "/v1/recommend", {"history": ["i1"]}).status == 200)
    assert endpoint.version() == before
    (file,) = Path(engine.config.workspace).glob("serving/*.json")
    assert len(json.loads(file.read_text())["releases"]) == 1


def test_a_second_start_does_not_replace_the_endpoint(endpoint: Running, engine: LocalEngine) -> None:
    job, before = command("serve", Path(engine.config.workspace), **endpoint.settings), endpoint.version()
    second = subprocess.run(job, env=endpoint.environment(), capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert second.stderr.splitlines()[-1].startswith("error: an endpoint runs on this Ray already; run jobs/promote.py")
    assert endpoint.version() == before
