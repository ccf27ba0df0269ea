"""A small workspace that can be served, made without Ray, and an engine that serves it in this process."""

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from l2d_ray.config import Config
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import Query
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import HistoryEncoder
from l2d_ray.index import aggregations
from l2d_ray.index.sharding import ShardedIndex
from l2d_ray.memory.store import MemoryStore
from l2d_ray.models.backbone import LanguageModel, load_language_model
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam
from l2d_ray.recommenders.contract import Recommender
from l2d_ray.serve.catalogue import ItemCatalogue
from l2d_ray.serve.engine import Answer, UnavailableError
from l2d_ray.serve.explanations import Explainer
from l2d_ray.serve.recommenders import L2D, find_served, make
from l2d_ray.serve.schemas import Explanation
from l2d_ray.stages.index_plan import plan_index
from l2d_ray.stages.settings import record_index, record_memory
from l2d_ray.stages.training import plan_training, train
from l2d_ray.workspace import Workspace
from support.growing import append, build_memory, random_log
from support.small_memory import build
from support.small_posterior import fit
from support.small_workspace import ITEM_COUNT, build_units, config_of, write_dataset


def write_endpoint(folder: Path, seed: int = 0, daily: bool = False, **overrides: Any) -> Config:
    """Write a dataset, a tiny model, a memory of 2 shards and its index with parameters; return their configuration."""
    write_dataset(folder, users=40, seed=seed, daily=daily)
    config = config_of(folder, **{"memory.units": 1, **overrides})
    workspace = Workspace.open(str(folder))
    dataset, store = Dataset.open(workspace), MemoryStore(workspace)
    build_units(config)
    store.keep_items(dataset.digest, dataset.items())
    store.take_snapshot(store.units(), dataset.digest, 1.0)
    record_memory(config, "float32")
    build(workspace)
    fit(config)
    record_index(config, 1)
    return config


def grow_endpoint(config: Config, interactions: int = 40) -> None:
    """Append new users with random items, one of them new, to the dataset; build what the memory and the index lack."""
    workspace = Workspace.open(config.workspace)
    dataset = Dataset.open(workspace)
    old, log = dataset.items(), random_log(interactions, users=5, items=ITEM_COUNT, seed=dataset.version.number)
    new = f"i{len(old)}"
    log = [(f"n{dataset.version.number}-{user}", item, time) for user, item, time in [*log, ("u0", new, 10**6)]]
    titles = dict(zip(old["item_id"].to_pylist(), old["title"].to_pylist(), strict=True))
    append(dataset, log, titles | {new: f"Title {new} of the year"})
    snapshot = build_memory(config)
    build(workspace, max_drift=9.0)
    fit(config)
    record_index(config, snapshot.number)


def train_recommender(config: Config, name: str = "sasrec", **settings: Any) -> None:
    """Train a recommender for one epoch on the dataset of a workspace."""
    train(plan_training(config.replace({"recommender": name, "train.epochs": 1, **settings})))


class LocalEngine:
    """The real model and index in this process: an `Engine`, and its `ServedRelease`."""

    version, snapshot, model = "v", "1-x", "m"

    def __init__(self, config: Config) -> None:
        self.config, workspace = config, Workspace.open(config.workspace)
        dataset = Dataset.open(workspace)
        self.catalogue, self.dataset = ItemCatalogue(dataset.items()), dataset.digest
        self.explainer = Explainer(workspace, self.dataset, self.catalogue.ids, self.catalogue.titles)
        self.encoder = HistoryEncoder(config, self.catalogue.titles)
        prior = config.index.prior_in(config.index.space)
        self.index = ShardedIndex.open(workspace, plan_index(config).manifest).with_prior(prior)
        self.aggregations = aggregations.offered(posterior=True)
        self.top_m, self.exclude_seen = 20, True
        self._beam_lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Answer again without failures, delays and beam search."""
        self.failure: Exception | None = None
        """Raised by L2D."""
        self.others: dict[str, Recommender] = {}
        """Recommenders next to L2D."""
        self.delay = 0.0
        """Seconds that `recommend` waits before it answers."""
        self.beams: int | None = None
        self.beam_failure: Exception | None = None
        self.beam_delay = 0.0
        self.beam_searches = 0
        """Calls of `beam_search`."""

    def current(self) -> "LocalEngine":
        return self

    def answer(self, query: Query) -> ScoredItems:
        """Return the items of one query, without a server."""
        states_UD = self.encoder.encode([query.history]).states_UD
        (items,) = self.index.recommend(states_UD, [query])
        return items

    def explain(self, query: Query, found: ScoredItems) -> Sequence[Explanation | None]:
        """Explain the items of one query, without a server."""
        (state_D,) = self.encoder.encode([query.history]).states_UD
        return self.explainer.explain(found.items_I.tolist(), self.index.explain(state_D, query.history, found))

    @cached_property
    def language_model(self) -> LanguageModel:
        """A model for beam search alone, which changes its attention."""
        return load_language_model(self.config.model)

    def beam_answer(self, query: Query) -> ScoredItems:
        """Return the items of one beam search, without a server."""
        if not self.beams:
            raise UnavailableError("no beams here")
        titles = self.catalogue.titles
        with self._beam_lock:  # an abandoned search may still run
            encoder = HistoryEncoder(self.config, titles, self.language_model.backbone)
            beam = ConstrainedBeam.over(self.language_model, encoder, len(titles), self.beams, batch_size=1)
            (found,) = beam.recommend([query])  # type: ignore[list-item]
        return found

    @property
    def recommenders(self) -> dict[str, str]:
        return {L2D: self.model} | {name: f"{name}+w" for name in self.others}

    def offer(self, *names: str) -> None:
        """Serve these recommenders next to L2D."""
        self.others = {name: make(find_served(name, self.config), self.config) for name in names}

    async def recommend(self, query: Query, recommender: str = L2D) -> Answer:
        if recommender != L2D:
            (found,) = self.others[recommender].recommend([query])
            return Answer(found, 0.0, 0.5, model=self.recommenders[recommender])
        if self.failure:
            raise self.failure
        started = time.perf_counter()
        await asyncio.sleep(self.delay)
        found = self.answer(query)
        explanations = self.explain(query, found) if query.explain else None
        known = query.aggregation == "posterior"
        milliseconds = 1000 * (time.perf_counter() - started)
        return Answer(found, milliseconds, 0.0, log_probabilities=known, explanations=explanations)

    async def beam_search(self, query: Query) -> Answer:
        self.beam_searches += 1
        if self.beam_failure:
            raise self.beam_failure
        started = time.perf_counter()
        await asyncio.sleep(self.beam_delay)
        items = await asyncio.to_thread(self.beam_answer, query)
        return Answer(items, 1000 * (time.perf_counter() - started), 0.0)

    def status(self) -> dict[str, Any]:
        return {"items": len(self.catalogue.ids), "beams": self.beams}
