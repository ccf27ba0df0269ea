"""The replicas that hold shards of the index. They have no use for torch, which takes seconds to import, and memory."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.index import aggregations
from l2d_ray.index.engine import engine
from l2d_ray.index.exchange import Request, partition, run
from l2d_ray.index.shard import IndexShard
from l2d_ray.serve.engine import Query
from l2d_ray.serve.releases import Held, Part, Release, ReleaseFile

T = TypeVar("T")


class MemoryShard(Part):
    """Some shards of the index, most often one."""

    def __init__(self, file: ReleaseFile, number: int, parts: int) -> None:
        """Open the shards of part `number` of so many. Raises InputError, naming the file, for what is wrong."""

        def load(release: Release) -> list[IndexShard]:
            reader = release.open()
            manifest = reader.manifest
            prior = release.config.index.prior_in(manifest.space)
            own = partition(len(manifest.shards), parts)[number]
            return [reader.shard(shard, verify=True).with_prior(prior, manifest.rows) for shard in own]

        self.held = Held(file, load)

    async def ask(self, version: str, request: Request) -> list[Any]:
        """What these shards answer. Raises VersionError if this replica does not hold that release."""
        return await asyncio.to_thread(_single, request.answer, await self.held.get(version))

    async def recommend(self, version: str, query: Query, queries_UD: Float64) -> list[ScoredItems]:
        """All hops of a query, a matrix of one row, over these shards alone.

        Raises VersionError if this replica does not hold that release.
        """
        shards: Sequence[IndexShard] = await self.held.get(version)
        return await asyncio.to_thread(_single, run, aggregations.recommend(queries_UD, [query]), shards)  # type: ignore[list-item]


def _single(work: Callable[..., T], *arguments: Any) -> T:
    """`work` with one thread of FAISS's: replicas share the cores."""
    engine.set_threads(1)
    return work(*arguments)
