"""The co-located layout: replicas that hold HTTP, model and index, which call each other as functions.

The event loop speaks HTTP; the model and each search run in threads. Such a replica costs what an encoder costs, and
the size of the index.
"""

import asyncio
import time

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import ServeConfig
from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.explanation import ItemExplanation
from l2d_ray.core.query import History, Query
from l2d_ray.distributed.serving.components import ENCODE_SHARE, Components
from l2d_ray.distributed.serving.encoders import Encoder
from l2d_ray.distributed.serving.gateway import Gateway
from l2d_ray.distributed.serving.hedging import await_reply
from l2d_ray.distributed.serving.metrics import milliseconds_since
from l2d_ray.distributed.serving.shards import MemoryShard
from l2d_ray.index.explanation import explain
from l2d_ray.serve.releases import ReleaseFile


class LocalComponents(Components):
    """A model and all shards of an index in this process."""

    def __init__(
        self,
        settings: ServeConfig,
        encoder: Encoder,
        shards: MemoryShard,
        beams: DeploymentHandle | None,
        recommenders: DeploymentHandle | None,
    ) -> None:
        """Take replicas of this process: an encoder, and the shard group of all shards."""
        super().__init__(settings, beams, recommenders)
        self.encoder, self.shards = encoder, shards
        self._encoding = 0

    async def encode(self, version: str, history: History, session: str) -> NDArray[np.float32]:
        """Return the hidden state [D] of one history. Sessions make no difference: there is one model."""
        return await await_reply("the model", self._encode(version, history))

    async def _encode(self, version: str, history: History) -> NDArray[np.float32] | None:
        """Return the state of one history, or None if too many wait already or it would be late.

        Raises TimeoutError if the model is silent.
        """
        if self._encoding >= self.settings.max_waiting:
            return None
        seconds = ENCODE_SHARE * self.settings.deadline_seconds
        self._encoding += 1
        try:
            async with asyncio.timeout(seconds):
                return await self.encoder.encode(version, history, seconds)
        finally:
            self._encoding -= 1

    async def search(self, version: str, shards: int, query: Query, query_UD: Float64) -> tuple[ScoredItems, list[int]]:
        """Return the items of a query. No shard can be missing."""
        started = time.perf_counter()
        (items,) = await await_reply("the index", self.shards.recommend(version, query, query_UD))
        self.metrics.shard(0, milliseconds_since(started))
        return items, []

    async def explain(
        self, version: str, shards: int, query: Query, query_UD: Float64, found: ScoredItems
    ) -> tuple[dict[int, ItemExplanation], list[int]]:
        """Explain the items of a query (`index.explanation`), with no shard away."""
        exchange = explain(query_UD[0], query.history, found)
        return await await_reply("the index", self.shards.run(version, exchange)), []


class ColocatedGateway(Gateway):
    """A gateway with the model and the index in its process."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        file: ReleaseFile,
        needs_key: bool,
        beams: DeploymentHandle | None,
        recommenders: DeploymentHandle | None,
        _follower: DeploymentHandle | None,
    ) -> None:
        """Load the served release; the parameters are those of `Gateway`.

        Raises InputError as `Gateway`, `Encoder` and `MemoryShard` do.
        """
        self._open(file, needs_key)
        encoder, shards = await asyncio.to_thread(Encoder, file), await asyncio.to_thread(MemoryShard, file, 0, 1)
        self._components = LocalComponents(self._settings, encoder, shards, beams, recommenders)
        await self._load(self._components)

    async def refresh(self) -> list[str]:
        """Load what the release file names and return the loaded versions (`ReleaseCache.refresh`)."""
        for part in (self._components.encoder, self._components.shards):
            await part.refresh()
        return await super().refresh()

    async def check_health(self) -> None:
        """Start a refresh. Raises RuntimeError if a batch hangs or the last ones failed."""
        for part in (self._components.encoder, self._components.shards):
            await part.check_health()
        await super().check_health()

    def counts(self) -> dict[str, int]:
        """Return the totals since the start (`EncoderMetrics.counts`)."""
        return self._components.encoder.counts()
