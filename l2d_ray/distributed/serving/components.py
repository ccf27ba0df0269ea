"""The components that answer for a gateway, wherever they run."""

import time
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import ServeConfig
from l2d_ray.core.arrays import Float64
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.explanation import ItemExplanation
from l2d_ray.core.query import History, Query
from l2d_ray.distributed.serving.hedging import await_reply, retry
from l2d_ray.distributed.serving.metrics import GatewayMetrics
from l2d_ray.distributed.serving.ray_private import by_grpc
from l2d_ray.serve.engine import UnavailableError

ENCODE_SHARE = 0.8
"""Share of a request's deadline within which the model must be done."""


class Components(ABC):
    """A model and an index, and where they are offered, replicas of others to compare with.

    `version` names the release that answers. Methods raise OverloadedError if a component has no time, and
    UnavailableError if it is away.
    """

    def __init__(
        self, settings: ServeConfig, beams: DeploymentHandle | None, recommenders: DeploymentHandle | None
    ) -> None:
        """Take the handles of the deployments to compare with; None for those that are not offered."""
        self.settings, self.metrics = settings, GatewayMetrics()
        self._beams = beams and by_grpc(beams)
        self._recommenders = recommenders and by_grpc(recommenders)

    @abstractmethod
    async def encode(self, version: str, history: History, session: str) -> NDArray[np.float32]:
        """Return the hidden state [D] of one history. Histories of one `session` begin alike."""

    @abstractmethod
    async def search(self, version: str, shards: int, query: Query, query_UD: Float64) -> tuple[ScoredItems, list[int]]:
        """Return the items of a query, and the shards that did not contribute.

        `shards` is the number of shards of the index. `query_UD` is the mapped hidden state, one row.
        """

    @abstractmethod
    async def explain(
        self, version: str, shards: int, query: Query, query_UD: Float64, found: ScoredItems
    ) -> tuple[dict[int, ItemExplanation], list[int]]:
        """Explain the items of a query (`index.explanation`), and return the shards whose items are left out."""

    async def search_beams(self, version: str, query: Query) -> ScoredItems:
        """Return the items that constrained beam search finds."""
        if self._beams is None:
            raise UnavailableError("beam search is not offered here (serve.beams)")
        search = self._beams.recommend
        items: ScoredItems = await await_reply("beam search", retry(lambda: search.remote(version, query)))
        return items

    async def recommend_by(self, version: str, name: str, query: Query) -> ScoredItems:
        """Return the items of a recommender next to L2D."""
        if self._recommenders is None:
            raise UnavailableError("only L2D is served here (serve.recommender)")
        recommend, deadline = self._recommenders.recommend, time.monotonic() + self.settings.deadline_seconds
        reply = retry(lambda: recommend.remote(version, name, query, within=deadline - time.monotonic()))
        items: ScoredItems = await await_reply(name, reply)
        return items
