"""Replicas that hold shards of the index. They import no torch, which costs seconds and memory."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.index import aggregations
from l2d_ray.index.engine import engine
from l2d_ray.index.exchange import Exchange, Request, partition, run
from l2d_ray.index.shard import IndexShard, open_segments
from l2d_ray.serve.release_cache import ReleaseCache, ReleaseReplica
from l2d_ray.serve.releases import Release, ReleaseFile

T = TypeVar("T")


class MemoryShard(ReleaseReplica):
    """A replica of a shard group: some shards of the index, most often one.

    Releases share the segments of their shards, so a promotion reads only those that are new, and the items.
    """

    def __init__(self, file: ReleaseFile, number: int, groups: int) -> None:
        """Open the shards of group `number` of `groups`. Raises InputError, naming the file, if one is damaged."""
        opened = open_segments()

        def load(release: Release) -> list[IndexShard]:
            reader = release.open()
            manifest = reader.manifest
            prior = release.config.index.prior_in(manifest.space)
            shards = partition(len(manifest.shards), groups)[number]
            return [
                reader.shard(shard, verify=True, opened=opened).with_prior(prior, manifest.rows) for shard in shards
            ]

        self.cache = ReleaseCache(file, load)

    async def answer(self, version: str, request: Request) -> list[Any]:
        """Return the answers of these shards. Raises VersionError if the replica does not hold that release."""
        return await asyncio.to_thread(_in_one_thread, request.answer, await self.cache.get(version))

    async def recommend(self, version: str, query: Query, query_UD: Float64) -> list[ScoredItems]:
        """Return the list of items of a query over these shards alone. `query_UD`: its mapped state, one row.

        Raises VersionError if the replica does not hold that release.
        """
        return await self.run(version, aggregations.recommend(query_UD, [query]))

    async def run(self, version: str, exchange: Exchange[T]) -> T:
        """Return the result of an exchange with these shards alone.

        Raises VersionError if the replica does not hold that release.
        """
        return await asyncio.to_thread(_in_one_thread, run, exchange, await self.cache.get(version))


def _in_one_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function while the search engine uses one thread, because replicas share the cores."""
    engine.set_threads(1)
    return function(*arguments)
