"""Replicas that hold a model: encoders of histories, and beam searchers to compare with."""

import threading
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray

from l2d_ray.core.decoding import ScoredItems
from l2d_ray.core.query import History, Query
from l2d_ray.distributed.serving.metrics import EncoderMetrics
from l2d_ray.encoding import HistoryEncoder, PhrasedHistory, identify_memory, language_model
from l2d_ray.recommenders.constrained_beam import ConstrainedBeam
from l2d_ray.records import MemoryIdentity, check_query
from l2d_ray.serve.batching import LateError, TokenBatcher
from l2d_ray.serve.release_cache import ReleaseCache, ReleaseReplica
from l2d_ray.serve.releases import Release, ReleaseFile

HUNG_SECONDS = 60
"""Seconds after which a running batch means that the model hangs; its replica is replaced."""
BROKEN_BATCHES = 5
"""Consecutive failed batches that mean a broken model, for example after a GPU error; its replica is replaced."""


@dataclass(frozen=True, eq=False)
class _Model:
    """A model with its queue, which releases share while their catalogue grows."""

    identity: MemoryIdentity
    encoder: HistoryEncoder
    batcher: TokenBatcher[PhrasedHistory, NDArray[np.float32]]


def model_origin(release: Release) -> tuple[MemoryIdentity, str]:
    """Return what decides the model of a release. Releases that differ in the index alone share it.

    Raises InputError if the memory of the index was made with another model than the configured one.
    """
    manifest = release.open().manifest
    check_query(manifest.identity, identify_memory(release.config))
    return manifest.identity, manifest.dataset


def check_batches(batcher: TokenBatcher[Any, Any], seconds: float) -> None:
    """Raise RuntimeError if one batch has been running for longer than `seconds`, or if the last ones all failed."""
    if batcher.failed >= BROKEN_BATCHES:
        raise RuntimeError(f"the last {batcher.failed} batches failed")
    if batcher.running_seconds() > seconds:
        raise RuntimeError(f"the model has been running one batch for more than {seconds:g} s")


class Encoder(ReleaseReplica):
    """A replica that turns histories into hidden states, in packed batches within the processor's token budget."""

    def __init__(self, file: ReleaseFile) -> None:
        """Load the model. Raises InputError if the memory of the index was made with another one."""
        config = file.first.config
        torch.set_num_threads(config.workers.cpus)
        self._metrics = EncoderMetrics()
        self._cache_bytes = round(config.serve.cache_megabytes * 1e6)
        self._models: WeakSet[_Model] = WeakSet()
        self.cache = ReleaseCache(file, self._load, model_origin)

    async def encode(self, version: str, history: History, within: float) -> NDArray[np.float32] | None:
        """Return the hidden state [D] of one history, or None if that cannot be done within `within` seconds.

        None instead of an error: Ray would log an error in full, when there is least time for it. Raises VersionError
        if the replica does not hold that release.
        """
        model = await self.cache.get(version)
        try:
            state_D: NDArray[np.float32] = await model.batcher(model.encoder.phrased(history), within)
        except LateError:
            return None
        return state_D

    def counts(self) -> dict[str, int]:
        """Return the totals since the start (`EncoderMetrics.counts`)."""
        return dict(self._metrics.counts)

    async def check_health(self) -> None:
        """Start a refresh. Raises RuntimeError if a batch hangs or the last ones failed."""
        await super().check_health()
        models = set(self.cache.contents())  # releases may share one
        self._metrics.state(
            waiting=max(model.batcher.waiting() for model in models),
            cache_bytes=sum(model.encoder.cache.bytes for model in models),
        )
        for model in models:
            check_batches(model.batcher, HUNG_SECONDS)

    def _load(self, release: Release) -> _Model:
        (identity, _), titles = model_origin(release), release.items()["title"].to_pylist()
        for model in self._models:
            if model.identity == identity and model.encoder.prompts.accept(titles):
                return model
        encoder = HistoryEncoder(release.config, titles, cache_bytes=self._cache_bytes)

        def run(histories: list[PhrasedHistory]) -> list[NDArray[np.float32]]:
            hits = encoder.cache.hits
            result = encoder.run(histories)
            self._metrics.batch(len(histories), result.tokens, encoder.cache.hits - hits)
            return list(result.states.numpy())

        model = _Model(identity, encoder, TokenBatcher(run, encoder.tokens_to_run, encoder.tokens_per_chunk))
        self._models.add(model)
        return model


@dataclass(frozen=True)
class _BeamSearch:
    """A beam search, which stops when its caller has left."""

    beam: ConstrainedBeam
    query: Query
    abandoned: threading.Event = field(default_factory=threading.Event)

    def run(self) -> ScoredItems:
        (found,) = self.beam.recommend([self.query], self.abandoned.is_set)
        return found


class BeamSearcher(ReleaseReplica):
    """A replica that recommends by constrained beam search, one query at a time."""

    def __init__(self, file: ReleaseFile, beams: int) -> None:
        """Load the model with its language head. Raises InputError if it has none."""
        config = file.first.config
        torch.set_num_threads(config.workers.cpus)
        self._beams = beams
        self._max_seconds = config.serve.beam_seconds + HUNG_SECONDS
        self._batcher = TokenBatcher[_BeamSearch, ScoredItems](lambda single: [single[0].run()], lambda _: 1, 1)
        self.cache = ReleaseCache(file, self._load, model_origin)

    async def recommend(self, version: str, query: Query) -> ScoredItems:
        """Return the items with the most probable titles.

        A search whose caller is cancelled stops before its next token, so that the next search need not wait for it.
        Raises VersionError if the replica does not hold that release.
        """
        search = _BeamSearch(await self.cache.get(version), query)
        try:
            return await self._batcher(search)
        finally:
            search.abandoned.set()

    async def check_health(self) -> None:
        """Start a refresh. Raises RuntimeError if a search hangs or the last ones failed."""
        await super().check_health()
        check_batches(self._batcher, self._max_seconds)

    def _load(self, release: Release) -> ConstrainedBeam:
        titles = release.items()["title"].to_pylist()
        model = language_model(release.config)
        encoder = HistoryEncoder(release.config, titles, model.backbone)
        return ConstrainedBeam.over(model, encoder, len(titles), self._beams, batch_size=1)
