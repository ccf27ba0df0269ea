"""The endpoint on Ray Serve: gateways that speak HTTP, encoders that hold the model, and the shards of the index.

A request runs: gateway (checks, ids to indices) -> one encoder (the state of the history) -> every shard, in one or two
hops (`index/sharding.py`) -> gateway (merge, titles). Shards are asked in parallel; models and searches run in threads.
Every question carries the version of its release (`releases.py`), so that no answer mixes two.
"""

import asyncio
import math
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import faiss
import numpy as np
import ray
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle

from l2d_ray.baselines.constrained_beam import ConstrainedBeam
from l2d_ray.config import Config, ServeConfig
from l2d_ray.core.decoding import Float64, ScoredItems
from l2d_ray.encoding import HistoryEncoder, PhrasedHistory, identify_memory, language_model
from l2d_ray.errors import InputError
from l2d_ray.index.shard import IndexShard
from l2d_ray.index.sharding import Hop, answers, dealt, run
from l2d_ray.recommender import NO_ITEM, Filters
from l2d_ray.records import MemoryIdentity, check_query
from l2d_ray.serve.api import KEYS_VARIABLE, create_app
from l2d_ray.serve.batching import TokenBatcher
from l2d_ray.serve.engine import Query, Served
from l2d_ray.serve.releases import Held, Release, ReleaseFile
from l2d_ray.serve.replicas import Replicas, ServedRelease, hops_of
from l2d_ray.serve.security import Keys

T = TypeVar("T")
REPLICA_VARIABLES = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 << 20),
}
"""Ray Serve's settings of a replica: one event loop a process, which nothing blocks for long once it has started; and
room for large batches (Ray's own limit is 4 MiB)."""
WEDGED_SECONDS = 60
"""A batch that runs for so long is taken for a model that hangs; its replica is replaced."""


def build_app(config: Config) -> Application:
    """The application of a configuration, whose `args` in a Serve YAML it is. Raises InputError if nothing is there."""
    return application(start_of(config))


def start_of(config: Config) -> ReleaseFile:
    """What a new endpoint is to serve. Raises InputError if it is not there."""
    release = Release.plan(config)
    return ReleaseFile(release.config.workspace, f"serving/{uuid.uuid4().hex[:12]}.json", release)


def application(file: ReleaseFile) -> Application:
    """The application that serves what `file` names. Raises InputError if the keys cannot be read."""
    config = file.first.config
    keys, settings = keys_of(config.serve), config.serve
    keys.check()
    model = {"num_cpus": config.workers.cpus, "num_gpus": config.workers.gpus}
    manifest = file.first.open().manifest
    megabytes = manifest.rows * manifest.bytes_per_row / 1e6
    parts = min(len(manifest.shards), math.ceil(megabytes / settings.shard_megabytes))
    encoder = _deployment(
        Encoder,
        model,
        num_replicas=settings.encoders,
        max_ongoing_requests=settings.max_waiting,
        max_queued_requests=settings.max_waiting,
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
    ).bind(file)
    shards = [
        _deployment(
            MemoryShard,
            {"num_cpus": 0.1},
            name=f"MemoryShard-{number}",
            num_replicas=settings.shard_replicas,
            max_ongoing_requests=64,
        ).bind(file, number, parts)
        for number in range(parts)
    ]
    beams = None
    if settings.beams:
        beams = _deployment(BeamSearcher, model, max_ongoing_requests=1, max_queued_requests=settings.max_waiting).bind(
            file, settings.beams
        )
    return _deployment(
        serve.ingress()(Gateway),
        {"num_cpus": 0.1},
        logs_requests=True,
        num_replicas=settings.gateways,
        max_ongoing_requests=1000,
        max_queued_requests=settings.max_waiting,
    ).bind(file, keys.required(), encoder, shards, beams)


def keys_of(settings: ServeConfig) -> Keys:
    """The keys that clients may use."""
    return Keys(KEYS_VARIABLE, settings.keys_file)


def _deployment(kind: type, resources: dict[str, float], logs_requests: bool = False, **options: Any) -> Any:
    logging_config = {"encoding": "JSON", "enable_access_log": logs_requests}
    # The job's own environment, too: Ray Serve adds only its working_dir to one that is given.
    environment = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    environment["env_vars"] = environment.get("env_vars", {}) | REPLICA_VARIABLES
    return serve.deployment(
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
        logging_config=logging_config,
        ray_actor_options={**resources, "runtime_env": environment},
        **options,
    )(kind)


class Part:
    """A replica that holds something of each release."""

    held: Held[Any]

    async def refresh(self) -> list[str]:
        """As of `Held`."""
        return await self.held.refresh()

    async def versions(self) -> list[str]:
        """What it holds, after it looked again as far as it can."""
        await self.held.refresh_quietly()
        return self.held.versions()

    async def check_health(self) -> None:
        """Ray Serve calls it every few seconds. Raise if the replica is to be replaced."""
        self._refreshing = asyncio.ensure_future(self.held.refresh_quietly())


@dataclass(frozen=True)
class _Model:
    """A model, and what waits for it."""

    origin: tuple[MemoryIdentity, str]
    encoder: HistoryEncoder
    batcher: TokenBatcher[PhrasedHistory, NDArray[np.float32]]


def _origin(release: Release) -> tuple[MemoryIdentity, str]:
    """What the model of a release is made from. Raises InputError if its index's memory was made with another."""
    manifest = release.open().manifest
    check_query(manifest.identity, identify_memory(release.config))
    return manifest.identity, manifest.dataset


def _check_not_hanging(batcher: TokenBatcher[Any, Any], seconds: float) -> None:
    """Raise if one batch has been running for longer."""
    if batcher.running_seconds() > seconds:
        raise RuntimeError(f"the model has been running one batch for more than {seconds:g} s")


class Encoder(Part):
    """Histories to states; what waits runs packed, as many tokens at a time as the processor likes."""

    def __init__(self, file: ReleaseFile) -> None:
        """Load the model. Raises InputError if it is not the one that the index's memory was made with."""
        torch.set_num_threads(file.first.config.workers.cpus)
        self._tokens = serve.metrics.Histogram(
            "l2d_ray_batch_tokens", "Distinct tokens of a batch", boundaries=[64, 256, 1024, 4096, 16384]
        )
        self._requests = serve.metrics.Histogram(
            "l2d_ray_batch_requests", "Requests of a batch", boundaries=[1, 2, 4, 8, 16, 32, 64]
        )
        self._hits = serve.metrics.Counter("l2d_ray_cache_hits", "Histories whose beginning needed not run again")
        self._misses = serve.metrics.Counter("l2d_ray_cache_misses", "Histories that ran as a whole")
        self._bytes = serve.metrics.Gauge("l2d_ray_cache_bytes", "Keys and values of recent histories")
        self._waiting = serve.metrics.Gauge("l2d_ray_waiting", "Requests that wait for the next batch")
        self._counts: Counter[str] = Counter()
        self._cache_bytes = round(file.first.config.serve.cache_megabytes * 1e6)
        self.held = Held(file, self._load)

    async def encode(self, version: str, history: list[int | str], within: float) -> NDArray[np.float32]:
        """The state [D] of one history.

        Raises VersionError if this replica does not hold that release, LateError if it cannot be done within so many
        seconds.
        """
        model = await self.held.get(version)
        state_D: NDArray[np.float32] = await model.batcher(model.encoder.phrased(history), within)
        return state_D

    def counts(self) -> dict[str, int]:
        """Since the start: batches, requests, tokens that went through the model, cache hits."""
        return dict(self._counts)

    async def check_health(self) -> None:
        """Raise also if a batch hangs."""
        await super().check_health()
        models = self.held.parts()  # one may serve several releases
        self._observe(models)
        for model in models:
            _check_not_hanging(model.batcher, WEDGED_SECONDS)

    def _load(self, release: Release, held: Sequence[_Model]) -> _Model:
        """The model of a release; the same one, if only the index is another."""
        origin, config = _origin(release), release.config
        for model in held:
            if model.origin == origin:
                return model
        titles = release.dataset().items()["title"].to_pylist()
        encoder = HistoryEncoder(config, titles, cache_bytes=self._cache_bytes)

        def run(histories: list[PhrasedHistory]) -> list[NDArray[np.float32]]:
            hits = encoder.cache.hits
            result = encoder.run(histories)
            self._note(len(histories), result.tokens, encoder.cache.hits - hits)
            return list(result.states.numpy())

        batcher = TokenBatcher(run, encoder.tokens_to_run, encoder.tokens_per_chunk)
        return _Model(origin, encoder, batcher)

    def _observe(self, models: Sequence[_Model]) -> None:
        self._waiting.set(max(model.batcher.waiting() for model in models))
        self._bytes.set(max(model.encoder.cache.bytes for model in models))

    def _note(self, requests: int, tokens: int, hits: int) -> None:
        self._counts.update(batches=1, requests=requests, tokens=tokens, hits=hits)
        self._requests.observe(requests)
        self._tokens.observe(tokens)
        for counter, count in ((self._hits, hits), (self._misses, requests - hits)):
            if count:
                counter.inc(count)


@dataclass(frozen=True)
class _Beams:
    """A model that writes."""

    origin: tuple[MemoryIdentity, str]
    beam: ConstrainedBeam


@dataclass(frozen=True)
class _BeamSearch:
    """One query, until nobody waits for it."""

    beam: ConstrainedBeam
    query: Query
    abandoned: threading.Event = field(default_factory=threading.Event)

    def run(self) -> ScoredItems:
        query = self.query
        filters = Filters(exclude_seen=False, deny=query.exclude, allow=query.allow)
        (items_K,), (scores_K,) = self.beam.recommend(
            [query.history],  # type: ignore[list-item]
            query.k,
            filters,
            self.abandoned.is_set,
        )
        return ScoredItems(items_K[items_K != NO_ITEM], scores_K[items_K != NO_ITEM])


class BeamSearcher(Part):
    """Histories to items by constrained beam search, one at a time: to compare with."""

    def __init__(self, file: ReleaseFile, beams: int) -> None:
        """Load the model with its head. Raises InputError if that has none."""
        torch.set_num_threads(file.first.config.workers.cpus)
        self._beams = beams
        self._longest = file.first.config.serve.beam_seconds + WEDGED_SECONDS
        self._run = TokenBatcher[_BeamSearch, ScoredItems](lambda alone: [alone[0].run()], lambda _: 1, 1)
        self.held = Held(file, self._load)

    async def recommend(self, version: str, query: Query) -> ScoredItems:
        """The K most probable titles' items. Raises VersionError if this replica does not hold that release.

        A search whose caller is cancelled ends with its next token: the next one need not wait for it.
        """
        search = _BeamSearch((await self.held.get(version)).beam, query)
        try:
            return await self._run(search)
        finally:
            search.abandoned.set()

    async def check_health(self) -> None:
        """Raise also if a search hangs."""
        await super().check_health()
        _check_not_hanging(self._run, self._longest)

    def _load(self, release: Release, held: Sequence[_Beams]) -> _Beams:
        """The model of a release; the same one, if only the index is another."""
        origin, config = _origin(release), release.config
        for beams in held:
            if beams.origin == origin:
                return beams
        titles = release.dataset().items()["title"].to_pylist()
        model = language_model(config)
        encoder = HistoryEncoder(config, titles, model.backbone)
        return _Beams(origin, ConstrainedBeam.over(model, encoder, len(titles), self._beams, batch_size=1))


class MemoryShard(Part):
    """Some shards of the index, most often one."""

    def __init__(self, file: ReleaseFile, number: int, parts: int) -> None:
        """Open the shards of part `number` of so many. Raises InputError, naming the file, for what is wrong."""

        def load(release: Release, held: Sequence[list[IndexShard]]) -> list[IndexShard]:
            reader = release.open()
            manifest = reader.manifest
            prior = release.config.index.prior_in(manifest.space)
            own = dealt(len(manifest.shards), parts)[number]
            return [reader.shard(shard, verify=True).with_prior(prior, manifest.rows) for shard in own]

        self.held = Held(file, load)

    async def ask(self, version: str, hop: Hop) -> list[Any]:
        """What these shards answer. Raises VersionError if this replica does not hold that release."""
        return await asyncio.to_thread(_single, answers, await self.held.get(version), hop)

    async def recommend(self, version: str, query: Query, queries_UD: Float64) -> list[ScoredItems]:
        """All hops of a query, a matrix of one row, over these shards alone.

        Raises VersionError if this replica does not hold that release.
        """
        shards: Sequence[IndexShard] = await self.held.get(version)
        return await asyncio.to_thread(_single, run, hops_of(query, len(shards), queries_UD), shards)


def _single(work: Callable[..., T], *arguments: Any) -> T:
    """`work` with one thread of FAISS's: replicas share the cores."""
    faiss.omp_set_num_threads(1)
    return work(*arguments)


class Gateway(Part):
    """The HTTP interface, and the `Engine` behind it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        file: ReleaseFile,
        needs_key: bool,
        encoder: DeploymentHandle,
        shards: list[DeploymentHandle],
        beams: DeploymentHandle | None,
    ) -> None:
        """Ready when the model and every shard hold the release that this serves; else InputError says what is wrong.

        `needs_key`: whoever started this has keys, and this node must have them, too.
        """
        self._file, self._settings = file, file.first.config.serve
        self._keys = keys_of(self._settings)
        self._keys.check()
        if needs_key and not self._keys.required():
            raise InputError(f"{KEYS_VARIABLE} is not set on this node, but is where the endpoint was started")
        replicas = Replicas(encoder, shards, beams, self._settings)
        self.held = await asyncio.to_thread(Held, file, lambda release, _: ServedRelease(release, replicas))
        await replicas.agree(self.held.served)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._settings, self._keys)

    def current(self) -> Served:
        """As in `Engine`."""
        served: Served = self.held.current()
        return served

    def file(self) -> ReleaseFile:
        """Where a new release is to be named."""
        return self._file
