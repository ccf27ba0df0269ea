"""The replicas that hold a model: what encodes histories, and what writes titles to compare with."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import serve

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.encoding import HistoryEncoder, PhrasedHistory, identify_memory, language_model
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam
from l2d_ray.records import MemoryIdentity, check_query
from l2d_ray.serve.batching import LateError, TokenBatcher
from l2d_ray.serve.engine import Query
from l2d_ray.serve.releases import Held, Part, Release, ReleaseFile

WEDGED_SECONDS = 60
"""A batch that runs for so long is taken for a model that hangs; its replica is replaced."""
BROKEN_BATCHES = 5
"""So many batches that fail one after the other are taken for a model that is broken, as after an error of a GPU."""


@dataclass(frozen=True)
class _Model:
    """A model, and what waits for it."""

    encoder: HistoryEncoder
    batcher: TokenBatcher[PhrasedHistory, NDArray[np.float32]]


def model_origin(release: Release) -> tuple[MemoryIdentity, str]:
    """What the model of a release is made from: where only the index is another, it is the same one.

    Raises InputError if its index's memory was made with another model.
    """
    manifest = release.open().manifest
    check_query(manifest.identity, identify_memory(release.config))
    return manifest.identity, manifest.dataset


def _check_runs(batcher: TokenBatcher[Any, Any], seconds: float) -> None:
    """Raise if one batch has been running for longer, or if none succeeds any more."""
    if batcher.failed >= BROKEN_BATCHES:
        raise RuntimeError(f"the last {batcher.failed} batches failed")
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
        self.held = Held(file, self._load, model_origin)

    async def encode(self, version: str, history: list[int | str], within: float) -> NDArray[np.float32] | None:
        """The state [D] of one history; None if it cannot be done within so many seconds: an error Ray would write to
        its logs in full, just when there is least time for it.

        Raises VersionError if this replica does not hold that release.
        """
        model = await self.held.get(version)
        try:
            state_D: NDArray[np.float32] = await model.batcher(model.encoder.phrased(history), within)
        except LateError:
            return None
        return state_D

    def counts(self) -> dict[str, int]:
        """Since the start: batches, requests, tokens that went through the model, cache hits."""
        return dict(self._counts)

    async def check_health(self) -> None:
        """Raise also if a batch hangs, or if they fail."""
        await super().check_health()
        models = self.held.parts()  # one may serve several releases
        self._observe(models)
        for model in models:
            _check_runs(model.batcher, WEDGED_SECONDS)

    def _load(self, release: Release) -> _Model:
        titles = release.items()["title"].to_pylist()
        encoder = HistoryEncoder(release.config, titles, cache_bytes=self._cache_bytes)

        def run(histories: list[PhrasedHistory]) -> list[NDArray[np.float32]]:
            hits = encoder.cache.hits
            result = encoder.run(histories)
            self._note(len(histories), result.tokens, encoder.cache.hits - hits)
            return list(result.states.numpy())

        batcher = TokenBatcher(run, encoder.tokens_to_run, encoder.tokens_per_chunk)
        return _Model(encoder, batcher)

    def _observe(self, models: Sequence[_Model]) -> None:
        self._waiting.set(max(model.batcher.waiting() for model in models))
        self._bytes.set(sum(model.encoder.cache.bytes for model in set(models)))

    def _note(self, requests: int, tokens: int, hits: int) -> None:
        self._counts.update(batches=1, requests=requests, tokens=tokens, hits=hits)
        self._requests.observe(requests)
        self._tokens.observe(tokens)
        for counter, count in ((self._hits, hits), (self._misses, requests - hits)):
            if count:
                counter.inc(count)


@dataclass(frozen=True)
class _BeamSearch:
    """One query, until nobody waits for it."""

    beam: ConstrainedBeam
    query: Query
    abandoned: threading.Event = field(default_factory=threading.Event)

    def run(self) -> ScoredItems:
        (found,) = self.beam.recommend([self.query], self.abandoned.is_set)  # type: ignore[list-item]
        return found


class BeamSearcher(Part):
    """Histories to items by constrained beam search, one at a time: to compare with."""

    def __init__(self, file: ReleaseFile, beams: int) -> None:
        """Load the model with its head. Raises InputError if that has none."""
        torch.set_num_threads(file.first.config.workers.cpus)
        self._beams = beams
        self._longest = file.first.config.serve.beam_seconds + WEDGED_SECONDS
        self._run = TokenBatcher[_BeamSearch, ScoredItems](lambda alone: [alone[0].run()], lambda _: 1, 1)
        self.held = Held(file, self._load, model_origin)

    async def recommend(self, version: str, query: Query) -> ScoredItems:
        """The K most probable titles' items. Raises VersionError if this replica does not hold that release.

        A search whose caller is cancelled ends with its next token: the next one need not wait for it.
        """
        search = _BeamSearch(await self.held.get(version), query)
        try:
            return await self._run(search)
        finally:
            search.abandoned.set()

    async def check_health(self) -> None:
        """Raise also if a search hangs, or if they fail."""
        await super().check_health()
        _check_runs(self._run, self._longest)

    def _load(self, release: Release) -> ConstrainedBeam:
        titles = release.items()["title"].to_pylist()
        model = language_model(release.config)
        encoder = HistoryEncoder(release.config, titles, model.backbone)
        return ConstrainedBeam.over(model, encoder, len(titles), self._beams, batch_size=1)
