"""Replicas that hold the recommenders next to L2D."""

import torch

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.distributed.serving.encoders import HUNG_SECONDS, check_batches
from l2d_ray.serve.batching import LateError, TokenBatcher
from l2d_ray.serve.recommenders import runs_model
from l2d_ray.serve.release_cache import ReleaseCache, ReleaseReplica, VersionError
from l2d_ray.serve.releases import Release, ReleaseFile

MAX_BATCH = 64
"""Queries that a recommender answers together."""


class Recommenders(ReleaseReplica):
    """A replica of the recommenders of `serve.recommender`. Each has a queue and a thread."""

    def __init__(self, file: ReleaseFile) -> None:
        """Make the recommenders. Raises InputError if one is damaged."""
        config = file.first.config
        torch.set_num_threads(config.workers.cpus if runs_model(file.first.recommenders, config) else 1)
        self.cache = ReleaseCache(file, self._load)

    async def recommend(self, version: str, name: str, query: Query, within: float) -> ScoredItems | None:
        """Return the items of one query, or None if that cannot be done within `within` seconds.

        Raises VersionError if the replica does not hold that release, or not that recommender of it.
        """
        queues = await self.cache.get(version)
        if name not in queues:
            raise VersionError
        try:
            found: ScoredItems = await queues[name](query, within)
        except LateError:
            return None
        return found

    async def check_health(self) -> None:
        """Start a refresh. Raises RuntimeError if a batch hangs or the last ones failed."""
        await super().check_health()
        for queues in self.cache.contents():
            for queue in queues.values():
                check_batches(queue, HUNG_SECONDS)

    def _load(self, release: Release) -> dict[str, TokenBatcher[Query, ScoredItems]]:
        return {
            name: TokenBatcher[Query, ScoredItems](recommender.recommend, lambda _: 1, MAX_BATCH)
            for name, recommender in release.make_recommenders().items()
        }
