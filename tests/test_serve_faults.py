"""The endpoint under a steady load, with two replicas of everything: what dies, and what is changed, meanwhile."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running_endpoint import Reply, Running, load, running
from small_endpoint import LocalEngine
from small_workspace import workers

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.serve.engine import Query

pytestmark = pytest.mark.ray
SETTINGS = {
    "workers.max": 1,
    "serve.gateways": 2,
    "serve.encoders": 2,
    "serve.shard_replicas": 2,
    "serve.shard_megabytes": 0.001,
}
RATE = 20
SECONDS = float(os.environ.get("L2D_RAY_FAULT_SECONDS", "25"))
"""Of load while replicas die."""
HISTORIES = [np.random.default_rng(seed).integers(0, 30, 1 + seed).tolist() for seed in range(8)]
QUESTIONS = [(history, aggregation) for history in HISTORIES for aggregation in ("local", "global")]
BODIES = [
    {"history": [f"i{item}" for item in history], "aggregation": aggregation, "k": 10}
    for history, aggregation in QUESTIONS
]


@pytest.fixture(scope="module")
def endpoint(engine: LocalEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(Path(engine.config.workspace), tmp_path_factory.mktemp("log") / "stderr", **SETTINGS) as endpoint:
        yield endpoint


def expected(engine: LocalEngine) -> list[ScoredItems]:
    """The right answers to the questions, of one process that answers them one by one."""
    return [
        engine.answer(Query(history, 10, aggregation, 200, np.unique(history)))  # type: ignore[arg-type]
        for history, aggregation in QUESTIONS
    ]


def check(replies: Sequence[Reply], right: dict[str, list[ScoredItems]]) -> Counter[str]:
    """Every reply is the right one of the version that it names, or a documented refusal; how many of each."""
    for reply in replies:
        if reply.status == 200:
            items = right[reply.body["version"]][reply.question]
            assert not reply.body["partial"]
            assert [item["item_id"] for item in reply.body["items"]] == [f"i{item}" for item in items.items_I], reply
            scores = [item["score"] for item in reply.body["items"]]
            np.testing.assert_allclose(scores, items.scores_I, rtol=1e-3)
        else:
            print(reply)
    return Counter(str(reply.status) for reply in replies)


def test_kills(endpoint: Running, engine: LocalEngine) -> None:
    right = {endpoint.version(): expected(engine)}
    kills: dict[str, float] = {}
    with load(endpoint.url, BODIES, RATE) as replies:
        time.sleep(SECONDS / 4)
        for part in ("MemoryShard-0", "Encoder", "Gateway"):
            victim = workers(f"ServeReplica:l2d_ray:{part}")[0]
            if part == "Gateway":
                victim.suspend()
                time.sleep(0.3)
            kills[part] = time.monotonic()
            victim.kill()
            time.sleep(SECONDS / 4)
    summary: dict[str, Any] = {"requests": len(replies), "statuses": check(replies, right)}
    ends = [*list(kills.values())[1:], float("inf")]
    for (part, killed), end in zip(kills.items(), ends, strict=True):
        after = [reply for reply in replies if killed <= reply.sent + reply.seconds and reply.sent < end]
        failures = [reply.sent + reply.seconds - killed for reply in after if reply.status != 200]
        summary[part] = {
            "failures": len(failures),
            "recovery": max(failures, default=0),
            "slowest": max(reply.seconds for reply in after),
        }
    print(json.dumps(summary))
