"""Search over the shard groups of an index: in parallel, hedged, and with partial answers where they are allowed.

A shard group consists of the shards that share a deployment, most often one. A query takes one or more rounds of
requests to all shards (`index/exchange.py`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from l2d_ray.config import ServeConfig
from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.explanation import ItemExplanation
from l2d_ray.core.query import Query
from l2d_ray.distributed.serving.hedging import ATTEMPTS, UNAVAILABLE, hedge, retry
from l2d_ray.distributed.serving.metrics import GatewayMetrics, milliseconds_since
from l2d_ray.index import aggregations
from l2d_ray.index.exchange import Exchange, partition
from l2d_ray.index.explanation import explain
from l2d_ray.serve.engine import UnavailableError

T = TypeVar("T")
HEDGE_BELOW = 16
"""Hedge a slow shard group only below this many requests in flight to it: above, it is under load, and hedging would
add to that."""


class ShardGroups:
    """The deployments that hold the shards of an index."""

    def __init__(self, handles: Sequence[DeploymentHandle], settings: ServeConfig, metrics: GatewayMetrics) -> None:
        """Call the groups by `handles`, in the order of their shards."""
        self.handles, self._settings, self._metrics = handles, settings, metrics
        self._in_flight: Counter[int] = Counter()
        """Requests in flight, by group."""

    async def search(self, version: str, shards: int, query: Query, query_UD: Float64) -> tuple[ScoredItems, list[int]]:
        """Return the items of a query, and the shards that did not contribute.

        `shards` is the number of shards of the index. `query_UD` is the mapped hidden state, one row. Raises
        UnavailableError if a shard is unavailable; with partial answers, only if all are.
        """
        return await self._with_available(shards, lambda sizes: self._search_groups(version, query, query_UD, sizes))

    async def explain(
        self, version: str, shards: int, query: Query, query_UD: Float64, found: ScoredItems
    ) -> tuple[dict[int, ItemExplanation], list[int]]:
        """Explain the items of a query (`index.explanation`) in one more round. Returns and raises as `search` does."""

        def attempt(sizes: dict[int, int]) -> Awaitable[dict[int, ItemExplanation]]:
            return self._drive(version, explain(query_UD[0], query.history, found), sizes)

        return await self._with_available(shards, attempt)

    async def _with_available(
        self, shards: int, attempt: Callable[[dict[int, int]], Awaitable[T]]
    ) -> tuple[T, list[int]]:
        """Return what `attempt` makes of the groups that are available, and the shards that are not.

        It gets the number of shards of each group.
        """
        groups, unavailable = partition(shards, len(self.handles)), set[int]()
        while True:
            missing = [shard for number in sorted(unavailable) for shard in groups[number]]
            if missing and (not self._settings.partial or len(missing) == shards):
                raise UnavailableError(f"shards {missing} of the index are unavailable; try again later")
            sizes = {number: len(group) for number, group in enumerate(groups) if group and number not in unavailable}
            try:
                return await attempt(sizes), missing
            except _GroupsUnavailableError as error:
                unavailable |= error.numbers

    async def _search_groups(self, version: str, query: Query, query_UD: Float64, sizes: dict[int, int]) -> ScoredItems:
        """Return the items of a query over these groups, given the number of shards in each."""
        found: list[ScoredItems]
        if len(sizes) == 1:  # the group runs all rounds itself
            (found,) = await self._call_groups("recommend", dict.fromkeys(sizes, (version, query, query_UD)))
        else:
            found = await self._drive(version, aggregations.recommend(query_UD, [query]), sizes)
        return found[0]

    async def _drive(self, version: str, exchange: Exchange[T], sizes: dict[int, int]) -> T:
        """Return the result of an exchange with these groups."""
        answers: Any = None  # starts the generator
        while True:
            try:
                request = exchange.send(answers)
            except StopIteration as done:
                result: T = done.value
                return result
            shares = zip(sizes, request.split(sizes.values()), strict=True)
            replies = await self._call_groups("answer", {number: (version, share) for number, share in shares})
            answers = [answer for reply in replies for answer in reply]

    async def _call_groups(self, method: str, arguments: dict[int, tuple[Any, ...]]) -> list[Any]:
        """Return the replies of the groups, called in parallel. Raises _GroupsUnavailableError if some are."""
        calls = [self._call(number, method, *values) for number, values in arguments.items()]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        unavailable = {
            number for number, reply in zip(arguments, replies, strict=True) if isinstance(reply, UNAVAILABLE)
        }
        if unavailable:
            raise _GroupsUnavailableError(unavailable)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return replies

    async def _call(self, number: int, method: str, *arguments: Any) -> Any:
        """Return the reply of one group, hedged where it has other replicas. Raises TimeoutError if it is silent."""
        started = time.perf_counter()
        hedged = self._settings.shard_replicas > 1 and self._in_flight[number] < HEDGE_BELOW
        attempts = ATTEMPTS if hedged else 1
        seconds = self._settings.shard_seconds / attempts
        self._in_flight[number] += 1
        try:
            remote = getattr(self.handles[number], method).remote
            reply = await hedge(attempts, seconds, lambda _: retry(lambda: remote(*arguments)))
        finally:
            self._in_flight[number] -= 1
        self._metrics.shard(number, milliseconds_since(started))
        return reply


@dataclass
class _GroupsUnavailableError(Exception):
    numbers: set[int]
