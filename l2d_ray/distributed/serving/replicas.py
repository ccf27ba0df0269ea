"""The distributed layout: components in replicas that a gateway calls, encoders and shard groups."""

import asyncio
import math
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import ServeConfig
from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.explanation import ItemExplanation
from l2d_ray.core.query import History, Query
from l2d_ray.distributed.serving.components import ENCODE_SHARE, Components
from l2d_ray.distributed.serving.hedging import ATTEMPTS, UNAVAILABLE, EncoderRouter, await_reply, hedge, retry
from l2d_ray.distributed.serving.ray_private import by_grpc, distinguish_calls
from l2d_ray.distributed.serving.search import ShardGroups
from l2d_ray.errors import InputError

START_SECONDS = 120
"""Seconds that a new gateway waits for started components to load its release. With partial answers, also the seconds
that it waits for shards to start."""


class Replicas(Components):
    """The components of an endpoint, each in separate replicas."""

    def __init__(
        self,
        encoder: DeploymentHandle,
        shard_groups: Sequence[DeploymentHandle],
        beams: DeploymentHandle | None,
        settings: ServeConfig,
        recommenders: DeploymentHandle | None = None,
    ) -> None:
        """Take the handles of the deployments; those of the shard groups in order."""
        super().__init__(settings, beams, recommenders)
        self._encoder = by_grpc(encoder)
        self.shards = ShardGroups([by_grpc(group) for group in shard_groups], settings, self.metrics)

    async def wait_for_release(self, version: str) -> None:
        """Wait until an encoder and every shard group have loaded a release, however long they take to start.

        With partial answers, all but one of the shard groups may be unavailable for longer than `START_SECONDS`.
        Raises InputError if a component has started, but still holds other releases after `START_SECONDS`.
        """
        # Only what L2D needs: the others are optional, and a long beam search would make the gateway wait.
        components = {"Encoder": self._encoder}
        components |= {f"MemoryShard-{group}": handle for group, handle in enumerate(self.shards.handles)}
        deadline = math.inf
        while True:
            replies = await asyncio.gather(*map(self._versions, components.values()))
            loaded = dict(zip(components, replies, strict=True))
            wrong = [name for name, versions in loaded.items() if versions and version not in versions]
            if not wrong and any(versions for name, versions in loaded.items() if name != "Encoder"):
                return
            if wrong:
                deadline = min(deadline, time.monotonic() + START_SECONDS)
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{', '.join(wrong)}: loaded another release than {version}; run the same command again"
                    )
            await asyncio.sleep(1)

    async def _versions(self, component: DeploymentHandle) -> list[str]:
        """Return the releases that a component holds once it has started. A shard group may be missing: none."""
        may_be_missing = self.settings.partial and component is not self._encoder
        try:
            async with asyncio.timeout(START_SECONDS if may_be_missing else None):
                versions: list[str] = await component.versions.remote()
        except UNAVAILABLE:
            if may_be_missing:
                return []
            raise
        return versions

    async def encode(self, version: str, history: History, session: str) -> NDArray[np.float32]:
        """Return the hidden state [D] of one history.

        A session goes to the same encoder while that is available and has time. Otherwise the next ones are called:
        at once if it has no time, after a share of the deadline if it is silent.
        """
        seconds = ENCODE_SHARE * self.settings.deadline_seconds
        deadline = time.monotonic() + seconds

        async def call(attempt: int) -> NDArray[np.float32] | None:
            distinguish_calls()
            encode = self._encoder.options(session_id=EncoderRouter.key(attempt, session)).encode
            state_D: NDArray[np.float32] | None
            state_D = await retry(lambda: encode.remote(version, history, within=deadline - time.monotonic()))
            return state_D

        attempts = min(ATTEMPTS, self.settings.encoders)
        return await await_reply("the model", hedge(attempts, seconds / attempts, call))

    async def search(self, version: str, shards: int, query: Query, query_UD: Float64) -> tuple[ScoredItems, list[int]]:
        """Return the items of a query, and the shards that did not contribute (`ShardGroups.search`)."""
        return await self.shards.search(version, shards, query, query_UD)

    async def explain(
        self, version: str, shards: int, query: Query, query_UD: Float64, found: ScoredItems
    ) -> tuple[dict[int, ItemExplanation], list[int]]:
        """Explain the items of a query (`ShardGroups.explain`)."""
        return await self.shards.explain(version, shards, query, query_UD, found)
