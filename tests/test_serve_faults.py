"""The endpoint under a steady load, with two replicas of everything: what dies, and what is changed, meanwhile.

`L2D_RAY_FAULT_SECONDS=60 L2D_RAY_FAULT_RATE=20 pytest -s tests/test_serve_faults.py -k killed_under_load` prints what
clients saw.
"""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.running_endpoint import Reply, Running, ask, load, request, running
from support.small_endpoint import LocalEngine, write_endpoint
from support.small_workspace import kill_worker, result_of, wait_for, workers
from support.tiny_models import save_tiny

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.serve.engine import Query
from l2d_ray.serve.releases import Release

pytestmark = [pytest.mark.ray, pytest.mark.alone]
SETTINGS = {
    "serve.gateways": 2,
    "serve.encoders": 2,
    "serve.shard_replicas": 2,
    "serve.shard_megabytes": 0.001,
    "serve.shard_seconds": 9,
}
RATE = float(os.environ.get("L2D_RAY_FAULT_RATE", "4"))
"""Requests a second."""
SECONDS = float(os.environ.get("L2D_RAY_FAULT_SECONDS", "25"))
"""Of load while replicas die."""
FROZEN = 0.5
"""Seconds before a kill, so that what is killed, or a gateway that waits for encoders, has requests in hand."""
KILLED = ("MemoryShard-0", "Encoder", "Gateway")
HISTORIES = [np.random.default_rng(seed).integers(0, 30, 1 + seed).tolist() for seed in range(8)]
QUESTIONS = [(history, aggregation) for history in HISTORIES for aggregation in ("local", "global")]
BODIES = [
    {"history": [f"i{item}" for item in history], "aggregation": aggregation, "k": 10}
    for history, aggregation in QUESTIONS
]
Right = dict[str, list[ScoredItems]]
"""The right answers to the questions, by version."""


@pytest.fixture(scope="module")
def endpoint(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(Path(engine.config.workspace), tmp_path_factory.mktemp("log") / "stderr", **SETTINGS) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    """Another model, dataset and index, with other shards."""
    folder = tmp_path_factory.mktemp("newer")
    save_tiny(folder / "model", seed=1)
    return LocalEngine(write_endpoint(folder, seed=1, **{"memory.num_shards": 3}))


@pytest.fixture(scope="module")
def folders(engine: LocalEngine, newer: LocalEngine) -> dict[str, Path]:
    """The workspace of each version."""
    return {Release.plan(own.config).version: Path(own.config.workspace) for own in (engine, newer)}


@pytest.fixture(scope="module")
def right(engine: LocalEngine, newer: LocalEngine) -> Right:
    """Of one process that answers one by one."""
    right = {Release.plan(own.config).version: answers(own) for own in (engine, newer)}
    older, later = right.values()
    assert all(one.items_I.tolist() != other.items_I.tolist() for one, other in zip(older, later, strict=True))
    return right


def answers(engine: LocalEngine) -> list[ScoredItems]:
    return [
        engine.answer(Query(history, 10, aggregation, 200, np.unique(history)))  # type: ignore[arg-type]
        for history, aggregation in QUESTIONS
    ]


def check(replies: Sequence[Reply], right: Right) -> Counter[int]:
    """Every reply is the right one of the version that it names, or a documented refusal; how many of each status."""
    print([reply for reply in replies if reply.status != 200])
    for reply in replies:
        if reply.status == 200:
            items = right[reply.body["version"]][reply.question]
            assert not reply.body["partial"]
            assert [item["item_id"] for item in reply.body["items"]] == [f"i{item}" for item in items.items_I], reply
            scores = [item["score"] for item in reply.body["items"]]
            np.testing.assert_allclose(scores, items.scores_I, rtol=1e-3)
        else:
            assert reply.status in (503, 504), reply
            assert set(reply.body) == {"detail", "request_id", "errors"}, reply
            assert reply.status == 504 or reply.headers["retry-after"] == "1"
    return Counter(reply.status for reply in replies)


def test_users_who_return_find_the_encoder_that_has_their_history(endpoint: Running) -> None:
    before, users, visits = endpoint.counts(), range(10), range(3, 9)
    for items in visits:
        for user in users:
            history = [f"i{(user + step) % 30}" for step in range(items)]
            assert ask(endpoint.url, "/v1/recommend", {"history": history})[0] == 200
    after = endpoint.counts()
    assert after["requests"] - before["requests"] == len(users) * len(visits)
    assert after["hits"] - before["hits"] == len(users) * (len(visits) - 1)


@pytest.mark.parametrize("part", ["MemoryShard-0", "Encoder"])
def test_a_frozen_replica_costs_no_answer(endpoint: Running, right: Right, part: str) -> None:
    replica = workers(f"ServeReplica:l2d_ray:{part}")[0]
    with load(endpoint.url, BODIES, rate=4) as replies:
        replica.suspend()
        try:
            time.sleep(10)  # less than until Ray Serve replaces it
        finally:
            replica.resume()
    print(sorted(round(reply.seconds, 1) for reply in replies))
    assert check(replies, right) == {200: len(replies)}


def test_replicas_killed_under_load_cost_no_wrong_answer(endpoint: Running, right: Right) -> None:
    kills: list[float] = []
    with load(endpoint.url, BODIES, RATE) as replies:
        time.sleep(SECONDS / 4)
        for part in KILLED:
            victim = workers(f"ServeReplica:l2d_ray:{part}")[0]
            frozen = workers("ServeReplica:l2d_ray:Encoder" if part == "Gateway" else f"ServeReplica:l2d_ray:{part}")
            for replica in frozen:
                replica.suspend()
            time.sleep(FROZEN)
            kills.append(time.monotonic())
            victim.kill()
            for replica in frozen:
                replica.resume()
            time.sleep(SECONDS / 4)
        stopped = time.monotonic()
    summary: dict[str, Any] = {"requests": len(replies), "statuses": check(replies, right)}
    for part, (killed, until) in zip(KILLED, pairwise([*kills, stopped]), strict=True):
        after = [reply for reply in replies if killed - FROZEN <= reply.sent < until - FROZEN]
        failed = [reply.sent - killed for reply in after if reply.status != 200]
        summary[part] = {
            "requests": len(after),
            "failures": len(failed),
            "recovery_seconds": round(max([0.0, *failed]), 3),
            "slowest_seconds": round(max(reply.seconds for reply in after), 3),
            "slow_until_seconds": round(max([0.0, *(r.sent - killed for r in after if r.seconds > 0.5)]), 3),
        }
        assert len(failed) <= RATE, summary
    print(json.dumps(summary))
    assert all(reply.status == 200 for reply in replies if reply.sent > stopped - 3), summary


def named(engine: LocalEngine) -> list[str]:
    """The versions that the replicas are to hold."""
    files = Path(engine.config.workspace).glob("serving/*.json")
    return [Release(**release).version for file in files for release in json.loads(file.read_text())["releases"]]


def other(folders: dict[str, Path], version: str) -> str:
    (other,) = folders.keys() - {version}
    return other


def start_promotion(
    endpoint: Running, folder: Path, engine: LocalEngine, until: Callable[[list[str]], bool]
) -> subprocess.Popen[str]:
    """A promotion that has come so far as `until` says of the versions that are named."""
    job, pipe = endpoint.promotion(folder), subprocess.PIPE
    process = subprocess.Popen(job, env=endpoint.environment(), stdout=pipe, stderr=pipe, text=True)
    wait_for(lambda: until(named(engine)) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.parametrize("moment", ["while replicas load", "when gateways turn"])
def test_a_promotion_that_is_killed_is_completed_by_the_same_command(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], right: Right, moment: str
) -> None:
    before = endpoint.version()
    after = other(folders, before)
    names = [before, after] if moment == "while replicas load" else [after, before]
    with load(endpoint.url, BODIES, RATE) as replies:
        process = start_promotion(endpoint, folders[after], engine, lambda versions: versions == names)
        process.kill()
        process.communicate()
        time.sleep(1)
        result = result_of(endpoint.promote(folders[after]))
    assert result["version"] == after
    assert check(replies, right) == {200: len(replies)}
    assert {reply.body["version"] for reply in replies} == {before, after}
    assert named(engine) == [after]
    assert endpoint.version() == after


def test_of_promotions_at_once_one_is_refused_and_no_answer_mixes(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], right: Right
) -> None:
    """One there, one back: whichever comes first, every replica ends with the one release that the file names."""
    before = endpoint.version()
    after = other(folders, before)
    with load(endpoint.url, BODIES, RATE) as replies:
        there = start_promotion(endpoint, folders[after], engine, lambda versions: len(versions) == 2)
        back = endpoint.promote(folders[before])
        _, said = there.communicate(timeout=300)
        ended = endpoint.version()
    assert sorted((there.returncode, back.returncode)) == [0, 2], (said, back.stderr)
    assert "another promotion is under way; run the same command again" in said + back.stderr
    assert named(engine) == [ended] == [after if there.returncode == 0 else before]
    assert check(replies, right) == {200: len(replies)}
    assert result_of(endpoint.promote(folders[after]))["version"] == after == endpoint.version()


def test_an_encoder_that_dies_while_a_release_is_loaded_does_not_stop_it(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], right: Right
) -> None:
    before = endpoint.version()
    after = other(folders, before)
    with load(endpoint.url, BODIES, RATE) as replies:
        process = start_promotion(endpoint, folders[after], engine, lambda versions: len(versions) == 2)
        kill_worker("ServeReplica:l2d_ray:Encoder")
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        again = result_of(endpoint.promote(folders[after]))
    assert json.loads(stdout.splitlines()[-1])["version"] == after == again["previous"]
    statuses = check(replies, right)
    assert statuses[200] >= len(replies) - RATE, statuses
    assert {reply.body["version"] for reply in replies if reply.status == 200} == {before, after}


def test_a_release_that_encoders_die_of_is_given_up(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], right: Right
) -> None:
    """As where there is no memory for both; those that are started in their place are not told to load it."""
    before = endpoint.version()
    wait_for(lambda: len(workers("ServeReplica:l2d_ray:Encoder")) == 2)
    first, second = workers("ServeReplica:l2d_ray:Encoder")
    with load(endpoint.url, BODIES, RATE) as replies:
        process = start_promotion(endpoint, folders[other(folders, before)], engine, lambda names: len(names) == 2)
        (file,) = Path(engine.config.workspace).glob("serving/*.json")
        once = file.stat().st_mtime_ns
        first.kill()
        wait_for(lambda: file.stat().st_mtime_ns != once and len(named(engine)) == 2)
        second.kill()
        _, said = process.communicate(timeout=300)
    assert process.returncode == 2, said
    assert "\nerror: Encoder: replicas died twice while they loaded this (" in "\n" + said
    assert named(engine) == [before]
    check(replies, right)
    wait_for(lambda: request(endpoint.url, "/v1/recommend", BODIES[0]).status == 200)
    assert endpoint.version() == before


def test_a_new_release_is_served_without_a_failure_and_no_answer_mixes_two(
    endpoint: Running, folders: dict[str, Path], right: Right
) -> None:
    before = endpoint.version()
    after = other(folders, before)
    with load(endpoint.url, BODIES, RATE) as replies:
        there = result_of(endpoint.promote(folders[after], **{"serve.deadline_seconds": 1}))
        turned = time.monotonic()
        again = result_of(endpoint.promote(folders[after]))
        time.sleep(2)  # of load
        back_from = time.monotonic()
        back = result_of(endpoint.promote(folders[before]))
        done = time.monotonic()
        refused = endpoint.promote(folders[after], **{"index.space": "none"})
        time.sleep(2)
    assert there["version"] == again["version"] == again["previous"] == back["previous"] == after
    assert there["previous"] == back["version"] == before
    assert refused.returncode == 2
    assert "run jobs/build_index.py with the same settings" in refused.stderr
    print(json.dumps({"requests": len(replies), "statuses": check(replies, right), "promotions": [there, again, back]}))
    assert check(replies, right) == {200: len(replies)}
    assert {reply.body["version"] for reply in replies if turned < reply.sent < back_from} == {after}
    assert {reply.body["version"] for reply in replies if reply.sent > done} == {before}
