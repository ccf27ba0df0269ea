"""The endpoint as a user starts it: on a real Ray Serve, asked over HTTP, with replicas killed under load."""

import asyncio
import importlib
import json
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from small_endpoint import LocalEngine, write_endpoint
from small_workspace import command, config_of, environment, kill_worker, result_of, wait_for
from tiny_models import save_tiny

from l2d_ray.baselines.constrained_beam import _AlongTrie
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.errors import InputError
from l2d_ray.serve.deployments import BeamSearcher, start_of
from l2d_ray.serve.engine import Query
from l2d_ray.serve.operation import serve_until_stopped

pytestmark = pytest.mark.ray
BEAMS = 4
SETTINGS = {"workers.max": 1, "serve.shard_replicas": 2, "serve.shard_megabytes": 0.001, "serve.partial": True}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the endpoint writes to stderr."""
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def url(engine: LocalEngine, log: Path) -> Iterator[str]:
    """A running endpoint. It must stop at SIGINT, with its result line."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"serve.port": port, "serve.beams": BEAMS, "serve.beam_seconds": 10}
    job = command("serve", Path(engine.config.workspace), **SETTINGS, **own)
    with log.open("w") as stderr:
        process = subprocess.Popen(job, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True)
    wait_for(lambda: "serving at" in log.read_text() or process.poll() is not None, seconds=180)
    assert process.poll() is None, log.read_text()
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=90)
    assert process.returncode == 0
    assert json.loads(stdout.splitlines()[-1])["url"] == f"http://127.0.0.1:{port}"


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """The status and the answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def check(engine: LocalEngine, answer: dict[str, Any], history: list[int | str], aggregation: str, k: int) -> None:
    """The items are those of the model and the index in one process."""
    exclude = np.array(sorted({item for item in history if isinstance(item, int)}), np.int64)
    expected = engine.answer(Query(history, k, aggregation, 200, exclude))  # type: ignore[arg-type]
    assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in expected.items_I]
    scores = [item["score"] for item in answer["items"]]
    np.testing.assert_allclose(scores, expected.scores_I, rtol=1e-3)


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
        check(engine, response, [3, "A film of tomorrow"], "local", 5)
    status, answer = ask(url, "/v1/recommend", {"history": ["nope"]})
    assert (status, answer["errors"][0]["field"]) == (422, "body.history")


def check_written(engine: LocalEngine, answer: dict[str, Any], history: list[int | str]) -> None:
    """The items are those of beam search in one process."""
    engine.beams, exclude = BEAMS, np.array(sorted({item for item in history if isinstance(item, int)}), np.int64)
    expected = engine.written(Query(history, 10, "local", 20, exclude))
    assert len(expected) == BEAMS
    assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in expected.items_I]
    np.testing.assert_allclose([item["score"] for item in answer["items"]], expected.scores_I, rtol=1e-3)


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
        version, queries = release.first.version, [Query([n], 10, "local", 20, np.array([n])) for n in range(3)]
        searches = [asyncio.create_task(searcher.recommend(version, query)) for query in queries]
        while not steps:
            await asyncio.sleep(0.01)
        for search in searches[:2]:
            search.cancel()
        return await searches[2]

    monkeypatch.setattr(_AlongTrie, "__call__", slow)
    found = asyncio.run(scenario())
    monkeypatch.undo()
    assert len(set(steps)) == 2  # the first, and the last; the second had not begun
    assert steps.count(steps[0]) <= 2 < steps.count(steps[-1])
    engine.beams = BEAMS
    assert found.items_I.tolist() == engine.written(Query([2], 10, "local", 20, np.array([2]))).items_I.tolist()


def test_killed_replicas_are_replaced_and_no_answer_is_wrong(url: str, engine: LocalEngine) -> None:
    def outcome() -> str:
        status, answer = ask(url, "/v1/recommend", {"history": ["i1", "i2", "i3"], "k": 10})
        if status != 200:
            assert status in (503, 504), answer
            return "unavailable"
        if answer["partial"]:
            assert answer["missing_shards"] == [1]
            assert {int(item["item_id"][1:]) for item in answer["items"]} <= set(engine.index.shards[0].items_I)
            return "partial"
        check(engine, answer, [1, 2, 3], "local", 10)
        return "whole"

    def until_whole() -> set[str]:
        outcomes, deadline = [outcome()], time.monotonic() + 90
        while outcomes[-5:] != ["whole"] * 5:
            assert time.monotonic() < deadline, outcomes
            outcomes.append(outcome())
        return set(outcomes)

    kill_worker("ServeReplica:l2d_ray:MemoryShard-0")
    assert until_whole() == {"whole"}  # its second replica answered
    for _ in range(2):
        kill_worker("ServeReplica:l2d_ray:MemoryShard-1")
    assert until_whole() == {"whole", "partial"}
    kill_worker("ServeReplica:l2d_ray:Encoder")
    assert "partial" not in until_whole()


def promote(folder: Path, log: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    (address,) = re.findall(r"RAY_ADDRESS=(\S+)", log.read_text())
    job = command("promote", folder, **SETTINGS, **settings)
    return subprocess.run(job, env=environment() | {"RAY_ADDRESS": address}, capture_output=True, text=True)


def test_a_new_release_is_served_without_a_failure_and_no_answer_mixes_two(
    url: str, engine: LocalEngine, log: Path, tmp_path: Path
) -> None:
    """Another model, dataset and index, with other shards: of one history the two recommend different items."""
    save_tiny(tmp_path / "model", seed=1)
    newer = LocalEngine(write_endpoint(tmp_path, seed=1, **{"memory.num_shards": 3}))
    history: list[int | str] = [1, 2, 3]
    older_version = ask(url, "/v1/status")[1]["version"]
    answers: list[tuple[int, dict[str, Any]]] = []
    beam_answers: list[tuple[int, dict[str, Any]]] = []
    stop = threading.Event()

    def load(path: str, answers: list[tuple[int, dict[str, Any]]]) -> None:
        while not stop.is_set():
            answers.append(ask(url, path, {"history": ["i1", "i2", "i3"], "k": 10}))

    with ThreadPoolExecutor(5) as pool:
        clients = [pool.submit(load, "/v1/recommend", answers) for _ in range(4)]
        clients.append(pool.submit(load, "/v1/beam_search", beam_answers))
        try:
            there = result_of(promote(tmp_path, log, **{"serve.deadline_seconds": 1}))
            again = result_of(promote(tmp_path, log))
            back = result_of(promote(Path(engine.config.workspace), log))
            refused = promote(tmp_path, log, **{"index.space": "none"})
        finally:
            stop.set()
    for client in clients:
        client.result()
    assert (there["previous"], back["version"]) == (older_version, older_version)
    assert again["version"] == again["previous"] == there["version"] == back["previous"] != older_version
    assert refused.returncode == 2
    assert "run jobs/build_index.py with the same settings" in refused.stderr
    of_version = {older_version: engine, there["version"]: newer}
    for status, answer in answers:
        assert status == 200, answer
        check(of_version[answer["version"]], answer, history, "local", 10)
    for status, answer in beam_answers:
        assert status == 200, answer
    by_version = {answer["version"]: answer for _, answer in beam_answers}
    assert by_version.keys() == of_version.keys()
    for version, answer in by_version.items():
        check_written(of_version[version], answer, history)
    changes = [after for before, after in pairwise(answer["version"] for _, answer in answers) if before != after]
    assert there["version"] in changes
    assert changes[-1] == older_version
    assert ask(url, "/v1/status")[1]["version"] == older_version


def test_a_release_that_cannot_be_loaded_leaves_the_old_one_served(
    url: str, engine: LocalEngine, log: Path, tmp_path: Path
) -> None:
    before = ask(url, "/v1/status")[1]["version"]
    write_endpoint(tmp_path, seed=2)
    (file, *_) = tmp_path.glob("index/**/rows.faiss")
    file.write_bytes(file.read_bytes()[:-1])
    refused = promote(tmp_path, log)
    assert refused.returncode == 2
    assert file.name in refused.stderr
    status, answer = ask(url, "/v1/recommend", {"history": ["i1", "i2", "i3"], "k": 10})
    assert (status, answer["version"]) == (200, before)
    check(engine, answer, [1, 2, 3], "local", 10)


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


def test_what_cannot_be_served_is_refused(engine: LocalEngine, tmp_path: Path) -> None:
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
