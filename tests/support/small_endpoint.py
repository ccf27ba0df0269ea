"""A workspace that can be served, made without Ray, and an engine over it in one process."""

import asyncio
import threading
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from l2d_ray.config import Config
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore
from l2d_ray.models.backbone import LanguageModel, load_language_model
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam
from l2d_ray.serve.catalogue import Catalogue
from l2d_ray.serve.engine import Answer, Query, UnavailableError
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.settings import record_index, record_memory
from l2d_ray.workspace import Workspace
from support.small_memory import build
from support.small_workspace import build_units, config_of, write_dataset


def write_endpoint(folder: Path, seed: int = 0, **overrides: Any) -> Config:
    """A dataset, a tiny model, a memory of 2 shards and its index; returns their configuration."""
    write_dataset(folder, users=40, seed=seed)
    config = config_of(folder, **{"memory.units": 1, **overrides})
    workspace = Workspace.open(str(folder))
    dataset, store = Dataset.open(workspace), MemoryStore(workspace)
    build_units(config)
    store.keep_items(dataset.digest, dataset.items())
    store.take_snapshot(store.units(), dataset.digest, 1.0)
    record_memory(config, "float32")
    build(workspace)
    record_index(config, 1)
    return config


class LocalEngine:
    """The real model and index, without Ray."""

    def __init__(self, config: Config) -> None:
        self.config, workspace = config, Workspace.open(config.workspace)
        self.catalogue = Catalogue(Dataset.open(workspace).items())
        self.encoder = HistoryEncoder(config, self.catalogue.titles)
        prior = config.index.prior_in(config.index.space)
        self.index = ShardedIndex.open(workspace, plan_index(config).manifest).with_prior(prior)
        self.top_m, self.exclude_seen = 20, True
        self.version, self.snapshot, self.model = "v", "1-x", "m"
        self.failure: Exception | None = None
        self.delay = 0.0
        self.beams: int | None = None
        self.beam_failure: Exception | None = None
        self.beam_delay = 0.0
        self._writing = threading.Lock()
        self.searches = 0
        """Times that beam search was asked for."""

    def current(self) -> "LocalEngine":
        return self

    def answer(self, query: Query) -> ScoredItems:
        """What the definition gives, one query alone."""
        state = self.encoder.encode([query.history]).states_UD
        return self.index.recommend(state, [query])[0]

    @cached_property
    def language_model(self) -> LanguageModel:
        """Of its own: beam search sets the model to another attention."""
        return load_language_model(self.config.model)

    def written(self, query: Query) -> ScoredItems:
        """What constrained beam search gives, one query alone."""
        if not self.beams:
            raise UnavailableError("no beams here")
        titles = self.catalogue.titles
        with self._writing:  # an answer that nobody waits for any more may still be written
            encoder = HistoryEncoder(self.config, titles, self.language_model.backbone)
            beam = ConstrainedBeam.over(self.language_model, encoder, len(titles), self.beams, batch_size=1)
            (found,) = beam.recommend([query])  # type: ignore[list-item]
        return found

    async def recommend(self, query: Query) -> Answer:
        if self.failure:
            raise self.failure
        started = time.perf_counter()
        await asyncio.sleep(self.delay)
        return Answer(self.answer(query), 1000 * (time.perf_counter() - started), 0.0)

    async def beam_search(self, query: Query) -> Answer:
        self.searches += 1
        if self.beam_failure:
            raise self.beam_failure
        started = time.perf_counter()
        await asyncio.sleep(self.beam_delay)
        return Answer(await asyncio.to_thread(self.written, query), 1000 * (time.perf_counter() - started), 0.0)

    def status(self) -> dict[str, Any]:
        return {"items": len(self.catalogue.ids), "beams": self.beams}
