"""The endpoint as a user starts it: on a real Ray Serve, over HTTP."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from support.hostile_inputs import CONTROL_HEADERS
from support.hostile_requests import Hostile, post, send
from support.running_endpoint import Running, ask, request, running
from support.served_items import BEAMS, SINGLE, check_answer, check_beam_answer, check_items
from support.small_endpoint import LocalEngine, train_recommender, write_endpoint
from support.small_workspace import wait_for, workers

from l2d_ray.core.query import Query
from l2d_ray.serve.middleware import REQUEST_ID

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
