"""An endpoint with two replicas of everything under a steady load, while replicas die and releases change.

`L2D_RAY_FAULT_SECONDS=60 L2D_RAY_FAULT_RATE=20 pytest -s tests/test_serve_faults.py -k killed_under_load` prints what
the clients saw.
"""

import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.running_endpoint import Reply, Running, ask, load, request, running
from support.served_items import check_items
from support.small_endpoint import LocalEngine, write_endpoint
from support.small_workspace import kill_worker, result_of, wait_for, workers
from support.tiny_models import save_tiny

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.serve.releases import Release

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]
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
"""Seconds of load while replicas die."""
SUSPENDED = 0.5
"""Seconds that replicas are suspended before a kill, so that the killed one has requests in hand."""
KILLED = ("MemoryShard-0", "Encoder", "Gateway")
HISTORIES = [np.random.default_rng(seed).integers(0, 30, 1 + seed).tolist() for seed in range(8)]
QUESTIONS = [(history, aggregation) for history in HISTORIES for aggregation in ("local", "global")]
BODIES = [
    {"history": [f"i{item}" for item in history], "aggregation": aggregation, "k": 10}
    for history, aggregation in QUESTIONS
]
Expected = dict[str, list[ScoredItems]]
"""The right answers to the questions, by version."""


@pytest.fixture(scope="module")
def endpoint(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(Path(engine.config.workspace), tmp_path_factory.mktemp("log") / "stderr", **SETTINGS) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    """Return an engine with another model, dataset and index, which has other shards."""
    folder = tmp_path_factory.mktemp("newer")
    save_tiny(folder / "model", seed=1)
    return LocalEngine(write_endpoint(folder, seed=1, **{"memory.num_shards": 3}))


@pytest.fixture(scope="module")
def folders(engine: LocalEngine, newer: LocalEngine) -> dict[str, Path]:
    """Return the workspaces by version."""
    return {Release.plan(one.config).version: Path(one.config.workspace) for one in (engine, newer)}


@pytest.fixture(scope="module")
def expected(engine: LocalEngine, newer: LocalEngine) -> Expected:
    """Return the answers of one process, one by one."""
    expected = {Release.plan(one.config).version: answers(one) for one in (engine, newer)}
    older, later = expected.values()
    assert all(one.items_I.tolist() != other.items_I.tolist() for one, other in zip(older, later, strict=True))
    return expected


def answers(engine: LocalEngine) -> list[ScoredItems]:
    return [engine.answer(Query.after(history, 10, aggregation=aggregation)) for history, aggregation in QUESTIONS]


def check(replies: Sequence[Reply], expected: Expected) -> Counter[int]:
    """Check that every reply is right for the version that it names, or a documented refusal. Count the statuses."""
    print([reply for reply in replies if reply.status != 200])
    for reply in replies:
        if reply.status == 200:
            assert not reply.body["partial"]
            check_items(reply.body, expected[reply.body["version"]][reply.question])
        else:
            assert reply.status in (503, 504), reply
            assert set(reply.body) == {"detail", "request_id", "errors"}, reply
            assert reply.status == 504 or reply.headers["retry-after"] == "1"
    return Counter(reply.status for reply in replies)


def test_returning_users_reach_the_encoder_that_has_cached_their_history(endpoint: Running) -> None:
    before, users, visits = endpoint.counts(), range(10), range(3, 9)
    for items in visits:
        for user in users:
            history = [f"i{(user + step) % 30}" for step in range(items)]
            assert ask(endpoint.url, "/v1/recommend", {"history": history})[0] == 200
    after = endpoint.counts()
    assert after["requests"] - before["requests"] == len(users) * len(visits)
    assert after["hits"] - before["hits"] == len(users) * (len(visits) - 1)


@pytest.mark.parametrize("component", ["MemoryShard-0", "Encoder"])
def test_a_suspended_replica_costs_no_answer(endpoint: Running, expected: Expected, component: str) -> None:
    replica = workers(f"ServeReplica:l2d_ray:{component}")[0]
    with load(endpoint.url, BODIES, rate=4) as replies:
        replica.suspend()
        try:
            time.sleep(10)  # Ray Serve would replace it later
        finally:
            replica.resume()
    print(sorted(round(reply.seconds, 1) for reply in replies))
    assert check(replies, expected) == {200: len(replies)}


def test_replicas_killed_under_load_cost_no_wrong_answer(endpoint: Running, expected: Expected) -> None:
    kills: list[float] = []
    with load(endpoint.url, BODIES, RATE) as replies:
        time.sleep(SECONDS / 4)
        for component in KILLED:
            victim = workers(f"ServeReplica:l2d_ray:{component}")[0]
            suspended = workers(
                "ServeReplica:l2d_ray:Encoder" if component == "Gateway" else f"ServeReplica:l2d_ray:{component}"
            )
            for replica in suspended:
                replica.suspend()
            time.sleep(SUSPENDED)
            kills.append(time.monotonic())
            victim.kill()
            for replica in suspended:
                replica.resume()
            time.sleep(SECONDS / 4)
        stopped = time.monotonic()
    summary: dict[str, Any] = {"requests": len(replies), "statuses": check(replies, expected)}
    for component, (killed, until) in zip(KILLED, pairwise([*kills, stopped]), strict=True):
        after = [reply for reply in replies if killed - SUSPENDED <= reply.sent < until - SUSPENDED]
        failed = [reply.sent - killed for reply in after if reply.status != 200]
        summary[component] = {
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
    """Return the versions that the release file names."""
    files = Path(engine.config.workspace).glob("serving/*.json")
    return [Release(**release).version for file in files for release in json.loads(file.read_text())["releases"]]


def other(folders: dict[str, Path], version: str) -> str:
    (other,) = folders.keys() - {version}
    return other


def start_promotion(
    endpoint: Running, folder: Path, engine: LocalEngine, until: Callable[[list[str]], bool]
) -> subprocess.Popen[str]:
    """Start a promotion and wait until the named versions satisfy `until`."""
    job, pipe = endpoint.promotion(folder), subprocess.PIPE
    process = subprocess.Popen(job, env=endpoint.environment(), stdout=pipe, stderr=pipe, text=True)
    wait_for(lambda: until(named(engine)) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.parametrize("moment", ["while replicas load", "when gateways turn"])
def test_the_same_command_completes_a_killed_promotion(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], expected: Expected, moment: str
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
    assert check(replies, expected) == {200: len(replies)}
    assert {reply.body["version"] for reply in replies} == {before, after}
    assert named(engine) == [after]
    assert endpoint.version() == after


@pytest.mark.long
def test_promotions_killed_at_random_are_completed_by_the_same_commands(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], expected: Expected
) -> None:
    chance, killed, seconds = random.Random(0), 0, 20.0
    with load(endpoint.url, BODIES, RATE) as replies:
        for _ in range(12):
            after = other(folders, endpoint.version())
            started = time.monotonic()
            process = subprocess.Popen(endpoint.promotion(folders[after]), env=endpoint.environment())
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, seconds))
                seconds = time.monotonic() - started
            killed += process.poll() is None
            process.kill()
            process.wait()
            assert result_of(endpoint.promote(folders[after]))["version"] == after == endpoint.version()
            assert named(engine) == [after]
    assert check(replies, expected) == {200: len(replies)}
    assert killed >= 6


def test_one_of_two_simultaneous_promotions_is_refused(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], expected: Expected
) -> None:
    """One goes there, one back. Whichever comes first, every replica ends with the release that the file names."""
    before = endpoint.version()
    after = other(folders, before)
    with load(endpoint.url, BODIES, RATE) as replies:
        there = start_promotion(endpoint, folders[after], engine, lambda versions: len(versions) == 2)
        back = endpoint.promote(folders[before])
        _, stderr = there.communicate(timeout=300)
        ended = endpoint.version()
    assert sorted((there.returncode, back.returncode)) == [0, 2], (stderr, back.stderr)
    assert "another promotion is under way; run the same command again" in stderr + back.stderr
    assert named(engine) == [ended] == [after if there.returncode == 0 else before]
    assert check(replies, expected) == {200: len(replies)}
    assert result_of(endpoint.promote(folders[after]))["version"] == after == endpoint.version()


def test_a_promotion_survives_the_death_of_an_encoder_that_loads(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], expected: Expected
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
    statuses = check(replies, expected)
    assert statuses[200] >= len(replies) - RATE, statuses
    assert {reply.body["version"] for reply in replies if reply.status == 200} == {before, after}


def test_a_release_that_kills_encoders_is_given_up(
    endpoint: Running, engine: LocalEngine, folders: dict[str, Path], expected: Expected
) -> None:
    """Encoders die as if two releases did not fit in memory. The successors of the encoders must not load it."""
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
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stderr
    assert "\nerror: Encoder: replicas died twice while they loaded the release (" in "\n" + stderr
    assert named(engine) == [before]
    check(replies, expected)
    wait_for(lambda: request(endpoint.url, "/v1/recommend", BODIES[0]).status == 200)
    assert endpoint.version() == before


def test_a_promotion_costs_no_request_and_no_answer_mixes_two_releases(
    endpoint: Running, folders: dict[str, Path], expected: Expected
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
    print(
        json.dumps({"requests": len(replies), "statuses": check(replies, expected), "promotions": [there, again, back]})
    )
    assert check(replies, expected) == {200: len(replies)}
    assert {reply.body["version"] for reply in replies if turned < reply.sent < back_from} == {after}
    assert {reply.body["version"] for reply in replies if reply.sent > done} == {before}
