"""The endpoint on Ray Serve: gateways that speak HTTP, encoders that hold the model, and the shards of the index.

A request runs: gateway (checks, ids to indices) -> one encoder (the state of the history) -> every shard, in one or two
hops (`index/sharding.py`) -> gateway (merge, titles). Shards are asked in parallel; nothing slow runs on an event loop.
"""

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, ObjectLostError, OutOfMemoryError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from l2d_ray.config import Config
from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.packing import Prompts
from l2d_ray.data.dataset import Dataset
from l2d_ray.encoding import HistoryEncoder, identify_memory
from l2d_ray.errors import InputError
from l2d_ray.index.manifest import IndexManifest
from l2d_ray.index.sharding import Hops, IndexReader, global_hops, local_hops
from l2d_ray.indexing import plan_index
from l2d_ray.records import check_query
from l2d_ray.serve.api import KEYS_VARIABLE, create_app
from l2d_ray.serve.batching import TokenBatcher
from l2d_ray.serve.catalogue import Catalogue
from l2d_ray.serve.engine import Answer, OverloadedError, Query, UnavailableError
from l2d_ray.serve.security import Keys
from l2d_ray.workspace import Workspace

APPLICATION = "l2d_ray"


class VersionError(Exception):
    """A replica is of another index than its caller: an update is on its way."""


AWAY = (
    ActorDiedError,
    ActorUnavailableError,
    DeploymentUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    ReplicaUnavailableError,
    TimeoutError,
    VersionError,
)
ATTEMPTS = 3
"""How often a replica is asked that dies meanwhile: it may be another one each time."""
HELD_BY_ENCODER = 64
"""Requests that an encoder takes in, so that its batches fill; what is beyond waits in the gateways."""
UPDATE_SECONDS = 120
"""A new gateway waits for so long for the other parts to be of its own version."""
WEDGED_SECONDS = 60
"""A batch that runs for so long is taken for a model that hangs; its replica is replaced."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_app(config: Config) -> Application:
    """The application of a configuration, whose `args` in a Serve YAML it is. Raises InputError if nothing is there."""
    workspace = Workspace.open(config.workspace)
    path = plan_index(config).manifest
    if not workspace.exists(path):
        raise InputError(f"{workspace.path(path)}: is not there; run jobs/build_index.py with the same settings")
    manifest = IndexReader.open(workspace, path).manifest
    check_query(manifest.identity, identify_memory(config))
    _check_dataset(Dataset.open(workspace), manifest)
    keys = _keys(config)
    keys.check()
    plain, settings = config.model_dump(mode="json"), config.serve
    cpus, gpus = config.workers.cpus, config.workers.gpus
    encoder = _deployment(
        Encoder,
        num_replicas=settings.encoders,
        max_ongoing_requests=HELD_BY_ENCODER,
        max_queued_requests=settings.max_waiting,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    ).bind(plain, path)
    memory = [
        _deployment(
            MemoryShard,
            name=f"MemoryShard-{number}",
            num_replicas=settings.shard_replicas,
            max_ongoing_requests=64,
            ray_actor_options={"num_cpus": 0.1},
        ).bind(plain, path, number)
        for number in range(len(manifest.shards))
    ]
    return _deployment(
        serve.ingress()(Gateway),
        num_replicas=settings.gateways,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(plain, path, keys.required(), encoder, memory)


def _deployment(kind: type, **options: Any) -> Any:
    return serve.deployment(health_check_period_s=5, graceful_shutdown_timeout_s=20, **options)(kind)


class Encoder:
    """Histories to states; what waits runs packed, as many tokens at a time as the processor likes."""

    def __init__(self, config: dict[str, Any], path: str) -> None:
        """Load the model. Raises InputError if it is not the one that the index's memory was made with."""
        settings = Config(**config)
        torch.set_num_threads(settings.workers.cpus)
        workspace = Workspace.open(settings.workspace)
        manifest = IndexManifest.read(workspace, path)
        self._version = manifest.digest()
        check_query(manifest.identity, identify_memory(settings))
        dataset = Dataset.open(workspace)
        _check_dataset(dataset, manifest)
        self._encoder = HistoryEncoder(settings, dataset.items()["title"].to_pylist())
        self._batcher = TokenBatcher(self._run, lambda prompt: prompt.size, self._encoder.tokens_per_chunk)
        self._tokens = serve.metrics.Histogram(
            "l2d_ray_batch_tokens", "Distinct tokens of a batch", boundaries=[64, 256, 1024, 4096, 16384]
        )
        self._requests = serve.metrics.Histogram(
            "l2d_ray_batch_requests", "Requests of a batch", boundaries=[1, 2, 4, 8, 16, 32, 64]
        )

    async def encode(self, version: str, history: list[int | str]) -> NDArray[np.float32]:
        """The state [D] of one history. Raises VersionError if the caller is of another version."""
        if version != self._version:
            raise VersionError
        return await self._batcher(self._encoder.phrase(history))

    def version(self) -> str:
        """Digest of the index's manifest that this replica belongs to."""
        return self._version

    def check_health(self) -> None:
        """Raise if a batch hangs."""
        if self._batcher.running_seconds() > WEDGED_SECONDS:
            raise RuntimeError(f"the model has been running one batch for more than {WEDGED_SECONDS} s")

    def _run(self, prompts: list[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        result = self._encoder.extract(Prompts.join(prompts))
        self._tokens.observe(result.tokens)
        self._requests.observe(len(prompts))
        return list(result.states.numpy())


class MemoryShard:
    """One shard of the index."""

    def __init__(self, config: dict[str, Any], path: str, number: int) -> None:
        """Open the shard. Raises InputError, naming the file, for what is wrong."""
        settings = Config(**config)
        workspace = Workspace.open(settings.workspace)
        reader = IndexReader.open(workspace, path)
        self._version = reader.manifest.digest()
        self._shard = reader.shard(number).with_prior(settings.index.prior, reader.manifest.rows)

    async def ask(self, version: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """What `IndexShard.method(*arguments)` gives. Raises VersionError if the caller is of another version."""
        if version != self._version:
            raise VersionError
        return await asyncio.to_thread(self._answer, method, arguments)

    def _answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        faiss.omp_set_num_threads(1)  # of this thread: replicas share the cores
        return getattr(self._shard, method)(*arguments)

    def version(self) -> str:
        """Digest of the index's manifest that this replica belongs to."""
        return self._version


class Gateway:
    """The HTTP interface, and the `Engine` behind it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self,
        config: dict[str, Any],
        path: str,
        needs_key: bool,
        encoder: DeploymentHandle,
        shards: list[DeploymentHandle],
    ) -> None:
        """Ready when the model and every shard are of the index at `path`; else RuntimeError says what differs.

        `needs_key`: whoever started this has keys, and this node must have them, too.
        """
        self._config = Config(**config)
        self._encoder, self._shards = encoder, shards
        workspace = Workspace.open(self._config.workspace)
        reader = IndexReader.open(workspace, path)
        self._manifest, self._space = reader.manifest, reader.space
        dataset = Dataset.open(workspace)
        _check_dataset(dataset, self._manifest)
        self._catalogue = Catalogue(dataset.items())
        self._keys = _keys(self._config)
        self._keys.check()
        if needs_key and not self._keys.required():
            raise RuntimeError(f"{KEYS_VARIABLE} is not set on this node, but is where the endpoint was started")
        identity = self._manifest.identity
        self._snapshot = path.removeprefix("index/").rpartition("/")[0]
        self._model = identity.base_model[:12] + (f"+{identity.adapter[:12]}" if identity.adapter else "")
        self._version = self._manifest.digest()
        names = ["Encoder", *(f"MemoryShard-{number}" for number in range(len(shards)))]
        deadline = time.monotonic() + UPDATE_SECONDS
        while True:
            theirs = await asyncio.gather(*(part.version.remote() for part in [encoder, *shards]))
            others = [name for name, version in zip(names, theirs, strict=True) if version != self._version]
            if not others:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{', '.join(others)}: of another index than {workspace.path(path)}")
            await asyncio.sleep(1)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._catalogue, self._config.serve, self._config.recommend.top_m, self._keys)

    async def recommend(self, query: Query) -> Answer:
        """As in `Engine`."""
        started = time.perf_counter()
        try:
            state_D = await _ask(self._encoder.encode, self._version, query.history)
        except BackPressureError:
            raise OverloadedError("too many requests wait for the model; come again later") from None
        except AWAY:
            raise UnavailableError("the model is away; come again later") from None
        encoded = time.perf_counter()
        items, missing = await self._search(query, self._space(state_D[None]))
        return Answer(
            items=items,
            snapshot=self._snapshot,
            model=self._model,
            encode_ms=1000 * (encoded - started),
            search_ms=1000 * (time.perf_counter() - encoded),
            missing_shards=missing,
        )

    async def status(self) -> dict[str, Any]:
        """As in `Engine`."""
        manifest = self._manifest
        return {
            "snapshot": self._snapshot,
            "model": self._model,
            "items": len(self._catalogue.ids),
            "rows": manifest.rows,
            "items_with_rows": manifest.items,
            "shards": len(self._shards),
            "space": manifest.space,
            "factory": manifest.factory,
            "quality": manifest.quality.model_dump(),
            "top_m": self._config.recommend.top_m,
        }

    async def _search(self, query: Query, queries_UD: NDArray[np.float64]) -> tuple[ScoredItems, list[int]]:
        """The items of a query, and the shards that were missing."""
        missing: list[int] = []
        while True:
            present = [number for number in range(len(self._shards)) if number not in missing]
            count, exclude = len(present), [query.exclude]
            if query.aggregation == "global":
                hops = global_hops(count, queries_UD, query.k, exclude, query.allow)
            else:
                hops = local_hops(count, queries_UD, query.k, exclude, query.top_m, query.allow)
            try:
                (items,) = await self._run(hops, present)
            except _ShardsAwayError as away:
                missing += away.numbers
                if not self._config.serve.partial or len(missing) == len(self._shards):
                    raise UnavailableError(f"shards {missing} of the index are away; come again later") from None
            else:
                return items, sorted(missing)

    async def _run(self, hops: Hops, present: Sequence[int]) -> list[ScoredItems]:
        hop = next(hops)
        while True:
            asked = [self._ask_shard(n, hop.method, own) for n, own in zip(present, hop.arguments, strict=True)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            away = [number for number, answer in zip(present, answers, strict=True) if isinstance(answer, AWAY)]
            if away:
                raise _ShardsAwayError(away)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer
            try:
                hop = hops.send(answers)
            except StopIteration as done:
                found: list[ScoredItems] = done.value
                return found

    async def _ask_shard(self, number: int, method: str, arguments: tuple[Any, ...]) -> Any:
        async with asyncio.timeout(self._config.serve.shard_seconds):
            return await _ask(self._shards[number].ask, self._version, method, arguments)


async def _ask(method: Any, *arguments: Any) -> Any:
    """The answer of a replica; of another one, if it dies meanwhile."""
    for _ in range(ATTEMPTS - 1):
        try:
            return await _cancellable(method.remote(*arguments))
        except AWAY:
            await asyncio.sleep(0.1)
    return await _cancellable(method.remote(*arguments))


async def _cancellable(response: Any) -> Any:
    """The answer; where nobody waits for it any more, it is not worked on either (Ray would go on)."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@dataclass
class _ShardsAwayError(Exception):
    numbers: list[int]


@dataclass(frozen=True)
class ServeResult:
    """An endpoint that has been stopped."""

    url: str
    seconds: float
    """It served."""


def serve_until_stopped(config: Config) -> ServeResult:
    """Serve on `serve.host` and `serve.port` until SIGINT or SIGTERM. Needs a Ray that is connected to.

    Raises InputError if there is nothing to serve, or if it would be open to other machines without a key.
    """
    settings = config.serve
    if settings.host not in LOOPBACK and not _keys(config).required():
        raise InputError(
            f"serve.host={settings.host!r}: would answer anybody; set serve.keys_file or {KEYS_VARIABLE}, or listen on"
            " 127.0.0.1"
        )
    application = build_app(config)
    _check_port(settings.host, settings.port)
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(application, name=APPLICATION, route_prefix="/")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    started, url = time.monotonic(), f"http://{settings.host}:{settings.port}"
    print(f"serving at {url} (page), {url}/docs (interface); Ctrl-C stops", file=sys.stderr)
    stop.wait()
    serve.delete(APPLICATION)  # not the whole of Serve, which others may use
    return ServeResult(url, round(time.monotonic() - started, 3))


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"serve.port={port}: cannot listen on {host}:{port} ({error.strerror})") from None


def _keys(config: Config) -> Keys:
    return Keys(KEYS_VARIABLE, config.serve.keys_file)


def _check_dataset(dataset: Dataset, manifest: IndexManifest) -> None:
    if dataset.digest != manifest.dataset:
        raise InputError(
            f"{dataset.workspace.path('dataset')}: is another dataset than the one that the index is of; run"
            " jobs/build_memory.py and jobs/build_index.py again"
        )
