"""A workspace that can be served, made without Ray, and an engine over it in one process."""

import asyncio
import time
from pathlib import Path
from typing import Any

from small_memory import build
from small_workspace import build_units, config_of, write_dataset

from l2d_ray.config import Config
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.indexing import plan_index
from l2d_ray.memory.store import MemoryStore
from l2d_ray.serve.catalogue import Catalogue
from l2d_ray.serve.engine import Answer, Query, UnavailableError
from l2d_ray.workspace import Workspace


def write_endpoint(folder: Path, seed: int = 0, **overrides: Any) -> Config:
    """A dataset, a tiny model, a memory of 2 shards and its index; returns their configuration."""
    write_dataset(folder, users=40, seed=seed)
    config = config_of(folder, **{"memory.units": 1, "workers.max": 1, **overrides})
    workspace = Workspace.open(str(folder))
    dataset, store = Dataset.open(workspace), MemoryStore(workspace)
    build_units(config)
    store.take_snapshot(store.units(), dataset.digest, 1.0)
    build(workspace)
    return config


class LocalEngine:
    """The real model and index, without Ray."""

    def __init__(self, config: Config) -> None:
        self.config, workspace = config, Workspace.open(config.workspace)
        self.catalogue = Catalogue(Dataset.open(workspace).items())
        self.encoder = HistoryEncoder(config, self.catalogue.titles)
        self.index = ShardedIndex.open(workspace, plan_index(config).manifest)
        self.top_m = 20
        self.version, self.snapshot, self.model = "v", "1-x", "m"
        self.failure: Exception | None = None
        self.delay = 0.0

    def current(self) -> "LocalEngine":
        return self

    def answer(self, query: Query) -> ScoredItems:
        """What the definition gives, one query alone."""
        state = self.encoder.encode([query.history]).states_UD
        if query.aggregation == "global":
            return self.index.recommend_global(state, query.k, [query.exclude], query.allow)[0]
        return self.index.recommend_local(state, query.k, [query.exclude], query.top_m, query.allow)[0]

    async def recommend(self, query: Query) -> Answer:
        if self.failure:
            raise self.failure
        started = time.perf_counter()
        await asyncio.sleep(self.delay)
        return Answer(self.answer(query), 1000 * (time.perf_counter() - started), 0.0)

    async def beam_search(self, query: Query) -> Answer:
        raise UnavailableError("no beams here")

    def status(self) -> dict[str, Any]:
        return {"items": len(self.catalogue.ids)}
