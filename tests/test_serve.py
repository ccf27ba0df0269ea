"""The endpoint as a user starts it: on a real Ray Serve, asked over HTTP."""

import asyncio
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from support.hostile_requests import EXAMPLES, STEERING, Hostile, attack, good, post, send
from support.running_endpoint import Reply, Running, ask, request, running
from support.small_endpoint import LocalEngine, write_endpoint
from support.small_workspace import command, config_of, kill_worker, run_job, wait_for, workers

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.distributed.serving.deployments import REPLICA_VARIABLES, start_of
from l2d_ray.distributed.serving.encoders import BROKEN_BATCHES, BeamSearcher
from l2d_ray.distributed.serving.endpoint import serve_until_stopped
from l2d_ray.distributed.serving.haproxy import free_ports
from l2d_ray.errors import InputError
from l2d_ray.recommenders.constrained_beam import _AlongTrie
from l2d_ray.serve.api import REQUEST_ID
from l2d_ray.serve.engine import Query

pytestmark = pytest.mark.ray
BEAMS = 4
HOSTILE = 3 * EXAMPLES
"""Requests."""
SETTINGS = {
    "serve.shard_replicas": 2,
    "serve.shard_megabytes": 0.001,
    "serve.partial": True,
    "serve.max_waiting": 64,
    "serve.beams": BEAMS,
}


@pytest.fixture(scope="module")
def endpoint(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(Path(engine.config.workspace), tmp_path_factory.mktemp("log") / "stderr", **SETTINGS) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def url(endpoint: Running) -> str:
    return endpoint.url


def check(engine: LocalEngine, answer: dict[str, Any], history: list[int | str], aggregation: str, k: int) -> None:
    """The items are those of the model and the index in one process."""
    exclude = np.array(sorted({item for item in history if isinstance(item, int)}), np.int64)
    expected = engine.answer(Query(history, k, aggregation, 200, exclude))  # type: ignore[arg-type]
    assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in expected.items_I]
    scores = [item["score"] for item in answer["items"]]
    np.testing.assert_allclose(scores, expected.scores_I, rtol=1e-3)


def check_partial(engine: LocalEngine, answer: dict[str, Any]) -> None:
    """Some shard is missing, and the items are of the others."""
    assert answer["missing_shards"]
    left = (shard for number, shard in enumerate(engine.index.shards) if number not in answer["missing_shards"])
    assert {int(item["item_id"][1:]) for item in answer["items"]} <= {int(i) for shard in left for i in shard.items_I}


@pytest.mark.parametrize("aggregation", ["local", "global"])
def test_requests_at_once_get_each_its_own_answer(url: str, engine: LocalEngine, aggregation: str) -> None:
    random = np.random.default_rng(1)
    histories = [random.integers(0, 30, random.integers(1, 15)).tolist() for _ in range(40)]
    bodies = [{"history": [f"i{n}" for n in own], "aggregation": aggregation, "k": 10} for own in histories]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: ask(url, "/v1/recommend", body), bodies))
    for history, (status, answer) in zip(histories, answers, strict=True):
        assert status == 200, answer
        check(engine, answer, history, aggregation, 10)
    _, status = ask(url, "/v1/status")
    assert {answer["snapshot"] for _, answer in answers} == {status["snapshot"]}
    assert {answer["model"] for _, answer in answers} == {status["model"]}
    assert (status["items"], status["rows"], status["shards"]) == (30, 360, 2)


def test_titles_batches_and_refusals_reach_the_client(url: str, engine: LocalEngine) -> None:
    own = {"history": ["i3", {"title": "A film of tomorrow"}], "k": 5}
    status, answer = ask(url, "/v1/recommend/batch", {"requests": [own, own]})
    assert status == 200
    for response in answer["responses"]:
        check(engine, response, [3, "A film of tomorrow"], "global", 5)
    status, answer = ask(url, "/v1/recommend", {"history": ["nope"]})
    assert (status, answer["errors"][0]["field"]) == (422, "body.history")


def check_written(engine: LocalEngine, answer: dict[str, Any], history: list[int | str]) -> None:
    """The items are those of beam search in one process."""
    engine.beams, exclude = BEAMS, np.array(sorted({item for item in history if isinstance(item, int)}), np.int64)
    expected = engine.written(Query(history, 10, "local", 20, exclude))
    assert len(expected) == BEAMS
    assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in expected.items_I]
    np.testing.assert_allclose([item["score"] for item in answer["items"]], expected.scores_I, rtol=1e-3)


@pytest.mark.parametrize("header", STEERING)
def test_no_header_steers_ray(url: str, header: bytes) -> None:
    good, bad = (
        send(url, Hostile("headers", post(body, header))) for body in (b'{"history": ["i3"]}', b'{"history": []}')
    )
    assert (good.status, bad.status) == (200, 422)
    for reply in (good, bad):
        assert REQUEST_ID.fullmatch(reply.headers["x-request-id"])
    assert bad.headers["x-request-id"] == json.loads(bad.body)["request_id"]


def test_the_id_of_a_client_comes_back_once(url: str) -> None:
    for path in (b"/v1/recommend", b"/none"):
        reply = send(url, Hostile("headers", post(b"{}", b"X-Request-ID: mine-1", path=path)))
        assert reply.headers["x-request-id"] == "mine-1", path


def test_hostile_requests_are_answered_in_words_by_ray_too(url: str, engine: LocalEngine) -> None:
    asked = [*workers("bin/haproxy"), *workers("ProxyActor"), *workers("ServeReplica:l2d_ray")]
    assert len(asked) > 5

    def good_ids(url: str) -> list[str]:
        """Of which the scores depend, in their last digits, on what the encoder's cache knew."""
        return [item["item_id"] for item in good(url)]

    attack(url, 0, HOSTILE // 2, good_ids)  # what is made once
    before = [process.memory_info().rss for process in asked]
    attack(url, 1, HOSTILE // 2, good_ids)
    grown = [process.memory_info().rss - rss for process, rss in zip(asked, before, strict=True)]
    print(f"{HOSTILE} hostile requests; MB that processes grew by: {[size >> 20 for size in grown]}")
    assert max(grown) < 32 << 20
    check(engine, ask(url, "/v1/recommend", {"history": ["i3"], "k": 5})[1], [3], "global", 5)


def test_headers_and_bodies_that_do_not_end_are_not_waited_for(url: str) -> None:
    sent = [b"POST /v1/recommend HTTP/1.1\r\nHost: a\r\n", post(b'{"history": ', length=b"100")]
    clients = [socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=60) for _ in sent]
    for client, part in zip(clients, sent, strict=True):
        client.sendall(part)
    for client in clients:
        with client:
            assert client.recv(12) == b"HTTP/1.1 408"


def test_beam_search_answers_beside_it(url: str, engine: LocalEngine) -> None:
    bodies = [{"history": [f"i{n}", {"title": "A film of tomorrow"}, "i3"], "k": 10} for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: ask(url, "/v1/beam_search", body), bodies))
    for number, (status, answer) in enumerate(answers):
        assert status == 200, answer
        check_written(engine, answer, [number, "A film of tomorrow", 3])
    assert ask(url, "/v1/status")[1]["beams"] == BEAMS


def test_beam_search_that_nobody_waits_for_stops(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], _AlongTrie.__call__

    def slow(self: _AlongTrie, *arguments: Any) -> Any:
        steps.append(self)
        time.sleep(0.05)
        return step(self, *arguments)

    async def scenario() -> ScoredItems:
        release = start_of(engine.config)
        searcher = BeamSearcher(release, BEAMS)
        settings = release.first.settings
        other = release.first.model_copy(update={"settings": settings | {"index": settings["index"] | {"prior": 7.0}}})
        release.write([release.first, other])
        await searcher.refresh()
        first, second = searcher.held.parts()
        assert first is second  # not loaded a second time, where only the index is another
        release.delete()
        version, queries = release.first.version, [Query([n], 10, "local", 20, np.array([n])) for n in range(3)]
        searches = [asyncio.create_task(searcher.recommend(version, query)) for query in queries]
        while not steps:
            await asyncio.sleep(0.01)
        for search in searches[:2]:
            search.cancel()
        found = await searches[2]
        assert len(set(steps)) == 2  # the first, and the last; the second had not begun
        assert steps.count(steps[0]) <= 2 < steps.count(steps[-1])
        for _ in range(BROKEN_BATCHES):
            steps.clear()
            search = asyncio.create_task(searcher.recommend(version, queries[0]))
            while not steps:
                await asyncio.sleep(0.01)
            search.cancel()
            while searcher._run.running_seconds():
                await asyncio.sleep(0.01)
        await searcher.check_health()  # to be left is no failure
        return found

    monkeypatch.setattr(_AlongTrie, "__call__", slow)
    found = asyncio.run(scenario())
    monkeypatch.undo()
    engine.beams = BEAMS
    assert found.items_I.tolist() == engine.written(Query([2], 10, "local", 20, np.array([2]))).items_I.tolist()


def test_what_is_left_of_the_index_answers_and_says_so(url: str, engine: LocalEngine) -> None:
    def outcome() -> str:
        status, answer = ask(url, "/v1/recommend", {"history": ["i1", "i2", "i3"], "k": 10, "aggregation": "local"})
        assert status == 200, answer
        if answer["partial"]:
            assert answer["missing_shards"] == [1]
            check_partial(engine, answer)
            return "partial"
        check(engine, answer, [1, 2, 3], "local", 10)
        return "whole"

    replicas = workers("ServeReplica:l2d_ray:MemoryShard-1")
    for replica in replicas:
        replica.suspend()  # dead ones might be replaced before anybody asks
    outcomes, deadline = [outcome()], time.monotonic() + 300
    for replica in replicas:
        replica.kill()
    while outcomes[-5:] != ["whole"] * 5:
        assert time.monotonic() < deadline, outcomes
        outcomes.append(outcome())
    assert outcomes[0] == "partial"


def test_so_many_wait_for_the_only_gateway_and_the_others_are_refused(url: str) -> None:
    most, deadline = SETTINGS["serve.max_waiting"], time.monotonic() + 300
    refused: list[Reply] = []
    while len(refused) < most / 2:  # those that come before the death is noticed wait with the dead one
        assert time.monotonic() < deadline
        kill_worker("ServeReplica:l2d_ray:Gateway")
        with ThreadPoolExecutor(2 * most) as pool:
            replies = list(pool.map(lambda _: request(url, "/v1/status", timeout=180), range(2 * most)))
        refused = [reply for reply in replies if reply.status != 200]
    for reply in refused:
        assert (reply.status, reply.headers["retry-after"], reply.body["errors"]) == (503, "1", [])
        assert "too many requests wait for it" in reply.body["detail"]


@pytest.mark.parametrize("part", ["Encoder", "Gateway"])
def test_the_only_replica_is_replaced(url: str, engine: LocalEngine, part: str) -> None:
    """Also while newer data is prepared in its workspace, and the dataset is away."""
    body, dataset = {"history": ["i1", "i2", "i3"], "k": 10}, Path(engine.config.workspace) / "dataset"
    dataset.rename(dataset.with_name("away"))
    try:
        kill_worker(f"ServeReplica:l2d_ray:{part}")
        replies, deadline = [request(url, "/v1/recommend", body)], time.monotonic() + 300
        while [reply.status for reply in replies[-5:]] != [200] * 5:
            assert time.monotonic() < deadline, replies
            replies.append(request(url, "/v1/recommend", body))
    finally:
        dataset.with_name("away").rename(dataset)
    for reply in replies:
        if reply.status == 200:
            check(engine, reply.body, [1, 2, 3], "global", 10)
        else:
            assert (reply.status, reply.headers.get("retry-after")) in ((503, "1"), (504, None)), reply


def test_prometheus_finds_the_metrics_where_the_start_says(endpoint: Running) -> None:
    assert ask(endpoint.url, "/v1/recommend", {"history": ["i1"]})[0] == 200
    (address,) = re.findall(r"http://\S+/metrics", endpoint.log.read_text())

    def exported() -> set[str]:
        return set(
            re.findall(r"^ray_l2d_ray_\w+?(?=_bucket|\{)", str(request(address, "").body, "utf-8"), re.MULTILINE)
        )

    of_a_request = {"ray_l2d_ray_requests_total", "ray_l2d_ray_phase_ms", "ray_l2d_ray_shard_ms"}
    of_a_batch = {"ray_l2d_ray_batch_requests", "ray_l2d_ray_batch_tokens", "ray_l2d_ray_waiting"}
    wait_for(lambda: exported() >= of_a_request | of_a_batch, seconds=60)


def test_haproxy_listens_on_this_machine_only(url: str) -> None:
    haproxy = workers("bin/haproxy")[-1]  # elder ones are on their way
    listening = [one.laddr for one in haproxy.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert urlsplit(url).port in [port for _, port in listening]
    assert {ip for ip, _ in listening} == {"127.0.0.1"}


def test_haproxy_that_dies_is_started_again(url: str, engine: LocalEngine) -> None:
    kill_worker("bin/haproxy")
    assert request(url, "/v1/recommend", {"history": ["i1"]}).status == 0
    wait_for(lambda: request(url, "/v1/recommend", {"history": ["i1"]}).status == 200, seconds=60)
    check(engine, ask(url, "/v1/recommend", {"history": ["i3"], "k": 5})[1], [3], "global", 5)


def test_overload_is_refused_with_a_time_to_come_again(url: str, engine: LocalEngine) -> None:
    history = ["i1", "i2", "i3"]
    batch = {"requests": [{"history": history, "k": 10}] * 64}
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: request(url, "/v1/recommend/batch", batch), range(24)))
    assert 503 in {reply.status for reply in replies} <= {200, 503, 504}  # 504 on a slow machine
    for reply in replies:
        if reply.status == 200:
            for answer in reply.body["responses"]:
                if answer["partial"]:  # a shard that came too late
                    check_partial(engine, answer)
                else:
                    check(engine, answer, [1, 2, 3], "global", 10)
        elif reply.status == 503:
            assert reply.headers["retry-after"] == "1"
            detail = reply.body["detail"].removesuffix(", or send fewer histories at once")
            assert detail.endswith("; come again later")
    reply = request(url, "/v1/recommend", {"history": history, "k": 10})
    assert (reply.status, reply.seconds < 5) == (200, True)


def test_what_nobody_waits_for_is_not_run(endpoint: Running, engine: LocalEngine) -> None:
    """A client leaves at once; of its long histories, which run one by one, the model has not seen all by then."""
    titles = [{"title": f"{number} " * 120} for number in range(64)]
    batch = {"requests": [{"history": [one, *titles[:9]]} for one in titles]}
    before = endpoint.counts()
    assert request(endpoint.url, "/v1/recommend/batch", batch, timeout=0.2).status == 0
    reply = request(endpoint.url, "/v1/recommend", {"history": ["i1", "i2", "i3"], "k": 10})
    assert (reply.status, reply.seconds < 5) == (200, True)
    check(engine, reply.body, [1, 2, 3], "global", 10)
    assert endpoint.counts()["requests"] - before["requests"] < 64


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_served(
    endpoint: Running, engine: LocalEngine, tmp_path: Path
) -> None:
    before = endpoint.version()
    write_endpoint(tmp_path, seed=2)
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
    check(engine, answer, [1, 2, 3], "global", 10)


def test_a_promotion_that_finds_a_part_without_replicas_names_it_and_goes_back(
    endpoint: Running, engine: LocalEngine, tmp_path: Path
) -> None:
    """The encoder has died, and its successor cannot start: its model is away."""
    write_endpoint(tmp_path, seed=2)
    before, model = endpoint.version(), Path(engine.config.model.name)
    model.rename(model.with_name("away"))
    try:
        kill_worker("ServeReplica:l2d_ray:Encoder")
        program = "from l2d_ray.distributed.serving import promotion; promotion.REPLACED_SECONDS = 20"
        job = endpoint.promotion(tmp_path)
        job[1:2] = [
            "-c",
            f"{program}; from l2d_ray.distributed.job import run; run('l2d_ray.distributed.serving.promotion:promote')",
        ]
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
    assert second.stderr.splitlines()[-1].startswith("error: an endpoint runs on this Ray already: jobs/promote.py")
    assert endpoint.version() == before


def test_models_that_never_fit_are_refused_where_ray_would_wait(engine: LocalEngine) -> None:
    (port,) = free_ports(1)
    asked = {"serve.port": port, "serve.encoders": 2, "serve.beams": BEAMS, "workers.cpus": 2 + (os.cpu_count() or 1)}
    refused = run_job("serve", Path(engine.config.workspace), **asked)
    assert refused.returncode == 2
    said = refused.stderr.splitlines()[-1]
    assert said.startswith("error: 3 workers of workers.cpus=")
    assert said.endswith("ask for less, or set serve.encoders")


def test_a_damaged_shard_is_named_at_the_start(tmp_path: Path) -> None:
    write_endpoint(tmp_path, seed=2)
    (file, *_) = tmp_path.glob("index/**/centroids.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (port,) = free_ports(1)
    refused = run_job("serve", tmp_path, **{"serve.port": port})
    assert refused.returncode == 2, refused.stderr
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert f"{file}: its checksum is not the recorded one" in line
    assert "Traceback" not in refused.stderr


def test_ray_serve_knows_the_settings_of_its_replicas() -> None:
    names = ", ".join(f"constants.{name}" for name in REPLICA_VARIABLES)
    command = [sys.executable, "-c", f"from ray.serve._private import constants; print([{names}])"]
    known = subprocess.run(command, env=os.environ | REPLICA_VARIABLES, capture_output=True, text=True, check=True)
    assert json.loads(known.stdout.lower()) == [False, False, 64 << 20]


def test_the_cluster_file_builds_the_application(engine: LocalEngine) -> None:
    file = yaml.safe_load((Path(__file__).parents[1] / "cluster/serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(file).applications
    assert file["http_options"]["host"] == "127.0.0.1"
    module, _, name = application.import_path.partition(":")
    config = engine.config
    own = {"workspace": config.workspace, "model": {"name": config.model.name}, "workers": {}}
    builder = getattr(importlib.import_module(module), name)
    built = call_user_app_builder_with_args_if_necessary(builder, application.args | own)
    assert isinstance(built, Application)
    with pytest.raises(ValidationError, match="typo"):
        call_user_app_builder_with_args_if_necessary(builder, {"typo": 1})


def test_what_cannot_be_served_is_refused(engine: LocalEngine, tmp_path: Path, ray_session: None) -> None:
    folder = Path(engine.config.workspace)
    taken = socket.create_server(("127.0.0.1", 0))
    for settings, message in (
        ({"serve.port": taken.getsockname()[1]}, "cannot listen on"),
        ({"index.space": "none"}, "run jobs/build_index.py with the same settings"),
        ({"serve.host": "0.0.0.0"}, "would answer anybody"),
        ({"serve.keys_file": tmp_path / "keys"}, "cannot be read"),
        ({"prompt.suffix": "Then:"}, "template"),
    ):
        with pytest.raises(InputError, match=message):
            serve_until_stopped(config_of(folder, **SETTINGS, **settings))
