"""Search over shard groups: hedged calls and partial answers."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.fake_handles import FakeHandle
from support.small_endpoint import LocalEngine

from l2d_ray.config import ServeConfig
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.distributed.serving.metrics import GatewayMetrics
from l2d_ray.distributed.serving.search import HEDGE_BELOW, ShardGroups
from l2d_ray.index import aggregations
from l2d_ray.index.exchange import Request, run
from l2d_ray.serve.engine import UnavailableError


def search(engine: LocalEngine, unavailable: set[int], partial: bool) -> tuple[ScoredItems, list[int]]:
    """Return the result of a gateway when some groups, of one shard each, do not answer."""
    query = Query.after([1, 2, 3], 10, aggregation="local")
    query_UD = engine.index.space(engine.encoder.encode([query.history]).states_UD)

    def handle(number: int, shards: Sequence[Any]) -> FakeHandle:
        async def answer(version: str, request: Request) -> list[Any]:
            if number in unavailable:
                raise TimeoutError
            return request.answer(shards)

        async def recommend(version: str, query: Query, query_UD: Any) -> list[ScoredItems]:
            return run(aggregations.recommend(query_UD, [query]), shards)

        return FakeHandle(answer=answer, recommend=recommend)

    handles = [handle(number, [shard]) for number, shard in enumerate(engine.index.shards)]
    groups = ShardGroups(handles, ServeConfig(partial=partial), GatewayMetrics())
    return asyncio.run(groups.search("v", len(handles), query, query_UD))


def test_an_answer_is_partial_only_if_the_operator_allows_it(engine: LocalEngine) -> None:
    everything = {*range(len(engine.index.shards))}
    whole, missing = search(engine, set(), partial=False)
    assert missing == []
    assert whole.items_I.tolist() == engine.answer(Query.after([1, 2, 3], 10, aggregation="local")).items_I.tolist()
    with pytest.raises(UnavailableError, match=r"shards \[0\] of the index are unavailable; try again later"):
        search(engine, {0}, partial=False)
    part, missing = search(engine, {0}, partial=True)
    assert missing == [0]
    assert part.items_I.tolist() != whole.items_I.tolist()
    assert not np.isin(part.items_I, engine.index.shards[0].items_I).any()
    with pytest.raises(UnavailableError):
        search(engine, everything, partial=True)


class Group:
    """A shard group whose first replicas hang. Each call reaches another replica."""

    def __init__(self, hanging: int, seconds: float = 0.0) -> None:
        self.hanging, self.seconds = hanging, seconds
        self.calls = self.cancelled = 0

    async def answer(self, question: str) -> str:
        self.calls += 1
        try:
            await asyncio.sleep(60 if self.calls <= self.hanging else self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return question


def call(group: Group, replicas: int, in_flight: int = 0, within: float = 0.3) -> str:
    """Return the reply of a group to a gateway that waits for `within` seconds."""
    settings = ServeConfig(shard_seconds=within, shard_replicas=replicas)
    groups = ShardGroups([FakeHandle(answer=group.answer)], settings, GatewayMetrics())
    groups._in_flight[0] = in_flight
    return str(asyncio.run(groups._call(0, "answer", "question")))


@pytest.mark.parametrize("hanging", [0, 1, 2])
def test_a_replica_that_hangs_is_hedged_by_another(hanging: int) -> None:
    group = Group(hanging)
    assert call(group, 2) == "question"
    assert (group.calls, group.cancelled) == (hanging + 1, hanging)


def test_a_slow_replica_may_still_reply_first() -> None:
    group = Group(0, seconds=2.5)
    assert call(group, 2, within=3) == "question"
    assert (group.calls, group.cancelled) == (3, 2)


@pytest.mark.parametrize(("replicas", "in_flight", "calls"), [(1, 0, 1), (2, 0, 3), (2, HEDGE_BELOW, 1)])
def test_a_group_that_hangs_is_hedged_only_with_other_replicas_and_little_load(
    replicas: int, in_flight: int, calls: int
) -> None:
    group = Group(9)
    with pytest.raises(TimeoutError):
        call(group, replicas, in_flight)
    assert (group.calls, group.cancelled) == (calls, calls)
